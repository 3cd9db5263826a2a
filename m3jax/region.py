"""Tells, on a TPU VM, whether a bucket is in another region than the slice.

Reading from another region is slower and costs money a byte. Elsewhere, such as on a laptop,
nothing is asked, and what the servers do not say within a second is no reason to stop.

| environment | meaning |
|---|---|
| `M3JAX_TPU_ZONE` | zone of the slice; default what the machine's metadata server says |
| `GCE_METADATA_HOST` | another metadata server, as for Google's libraries |
"""

from __future__ import annotations

import contextlib
import glob
import http.client
import json
import os
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3jax.printable import complain
from m3jax.store import GCS, is_bucket

_CHIPS = ("/dev/accel*", "/dev/vfio/[0-9]*")  # devices of a TPU VM
_SECONDS = 1.0
_CONTINENTS = {"US": "us-", "EU": "europe-", "ASIA": "asia-"}  # multi-regions: their regions


def warn_of_regions(*places: Path | str | None) -> None:
    """Warns of each bucket among workdirs and banks that is not in the region of this TPU VM."""
    urls = [os.fspath(place) for place in places if place is not None and is_bucket(place)]
    buckets = {url.removeprefix(GCS).partition("/")[0] for url in urls}
    if not buckets or not any(map(glob.glob, _CHIPS)):
        return
    zone = os.environ.get("M3JAX_TPU_ZONE") or _metadata("instance/zone").rpartition("/")[2]
    for bucket in sorted(buckets):
        there = _location(bucket) if zone else {}
        if there and not covers(there, zone):
            complain(
                f"the bucket {GCS}{bucket} is in {there['location']}, this slice in {zone}: reading"
                " from another region is slower and costs money a byte; use a bucket in"
                f" {zone.rpartition('-')[0]}, or a slice in the bucket's region"
            )


def covers(there: Mapping[str, Any], zone: str) -> bool:
    """Returns whether a bucket's `location` and `locationType` cover a zone, or do not tell."""
    location, region = str(there.get("location", "")).upper(), zone.rpartition("-")[0]
    if there.get("locationType") == "region":
        return location == region.upper()
    if there.get("locationType") == "multi-region" and location in _CONTINENTS:
        return region.startswith(_CONTINENTS[location])
    return True  # two regions, whose names not all answers have


def _location(bucket: str) -> dict[str, Any]:
    """Returns location and its type; {} if they are not to be known."""
    server = os.environ.get("TENSORSTORE_GCS_HTTP_URL", "https://storage.googleapis.com")
    token = os.environ.get("GOOGLE_AUTH_TOKEN_FOR_TESTING")
    with contextlib.suppress(ValueError, KeyError):
        token = (
            token
            or json.loads(_metadata("instance/service-accounts/default/token"))["access_token"]
        )
        url = f"{server}/storage/v1/b/{bucket}?fields=location,locationType"
        return json.loads(_get(url, {"Authorization": f"Bearer {token}"}))
    return {}


def _metadata(name: str) -> str:
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    return _get(f"http://{host}/computeMetadata/v1/{name}", {"Metadata-Flavor": "Google"})


def _get(url: str, headers: Mapping[str, str]) -> str:
    """Returns the text at a URL; "" if there is no good answer in time."""
    request = urllib.request.Request(url, headers=dict(headers))
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            return answer.read().decode()
    except (OSError, http.client.HTTPException, ValueError):
        return ""
