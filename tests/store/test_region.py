"""The region of a bucket and that of a slice: equal, different, and not to be known."""

import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from store.cloud_storage import BUCKET, Fault

from m3jax import region
from m3jax.region import covers, warn_of_regions

URL = f"gs://{BUCKET}/run"


@pytest.fixture
def slice_in(monkeypatch):
    """Makes this machine a TPU VM of a zone."""

    def make(zone: str) -> None:
        monkeypatch.setattr(region, "_CHIPS", ("/dev/null",))
        monkeypatch.setenv("M3JAX_TPU_ZONE", zone)

    return make


def test_another_region_is_said_once_for_a_bucket(quick_server, slice_in, capsys):
    slice_in("us-west4-a")
    quick_server.location = {"location": "US-EAST1", "locationType": "region"}
    warn_of_regions(URL, f"gs://{BUCKET}/bank", "runs/local", None)
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"gs://{BUCKET} is in US-EAST1, this slice in us-west4-a: reading" in told
    assert "use a bucket in us-west4," in told


@pytest.mark.parametrize(
    "location",
    [
        {"location": "US-WEST4", "locationType": "region"},
        {"location": "US", "locationType": "multi-region"},
        {"location": "NAM4", "locationType": "dual-region"},
        {},
    ],
)
def test_the_same_region_and_what_does_not_tell_are_no_reason(
    quick_server, slice_in, capsys, location
):
    slice_in("us-west4-a")
    quick_server.location = location
    warn_of_regions(URL)
    assert capsys.readouterr().err == ""
    assert any("fields=location" in line for line, _ in quick_server.requests)


def test_a_multi_region_is_a_continent():
    europe = {"location": "EU", "locationType": "multi-region"}
    assert covers(europe, "europe-west4-b") and not covers(europe, "us-central2-b")


@pytest.mark.parametrize("status", [403, 404, 0])
def test_who_may_not_know_is_told_nothing(quick_server, slice_in, capsys, status):
    slice_in("us-west4-a")
    quick_server.location = {"location": "US-EAST1", "locationType": "region"}
    quick_server.faults = [Fault("GET.*fields=location", status, times=9)]
    warn_of_regions(URL)
    assert capsys.readouterr().err == ""


def test_a_laptop_asks_nobody(quick_server, monkeypatch):
    monkeypatch.setattr(region, "_CHIPS", ("/dev/no such chip*",))
    monkeypatch.setattr(region, "_get", None)
    warn_of_regions(URL)
    monkeypatch.setattr(region, "_CHIPS", ("/dev/null",))
    warn_of_regions("runs/local", None)
    assert not quick_server.requests


class _Metadata(BaseHTTPRequestHandler):
    answers = {
        "/computeMetadata/v1/instance/zone": "projects/1/zones/europe-west4-b",
        "/computeMetadata/v1/instance/service-accounts/default/token": '{"access_token": "t"}',
    }

    def do_GET(self) -> None:
        time.sleep(self.server.delay)
        data = self.answers[self.path].encode() if self.headers["Metadata-Flavor"] else b""
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


def test_the_zone_is_that_of_the_metadata_server_if_it_answers(quick_server, monkeypatch, capsys):
    monkeypatch.setattr(region, "_CHIPS", ("/dev/null",))
    monkeypatch.setattr(region, "_SECONDS", 0.2)
    monkeypatch.delenv("M3JAX_TPU_ZONE", raising=False)
    monkeypatch.delenv("GOOGLE_AUTH_TOKEN_FOR_TESTING")
    quick_server.location = {"location": "US", "locationType": "multi-region"}
    with HTTPServer(("127.0.0.1", 0), _Metadata) as server:
        server.delay = 0.0
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
        warn_of_regions(URL)
        assert "is in US, this slice in europe-west4-b" in capsys.readouterr().err
        server.delay = 0.5
        warn_of_regions(URL)
        assert capsys.readouterr().err == ""
        server.shutdown()
