"""The fake of Google Cloud Storage keeps to what Google documents, where m3jax depends on it."""

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

import pytest
from store.cloud_storage import BUCKET, CloudStorage, Fault, serving


@pytest.fixture
def server() -> Iterator[CloudStorage]:
    with serving() as server:
        yield server


def ask(
    server: CloudStorage, method: str, path: str, data: bytes | None = None, **headers: str
) -> tuple[int, bytes]:
    request = urllib.request.Request(server.url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def put(server: CloudStorage, name: str, data: bytes, condition: str = "") -> tuple[int, int]:
    name = urllib.parse.quote(name, safe="")
    path = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={name}{condition}"
    status, answer = ask(server, "POST", path, data)
    return status, int(json.loads(answer).get("generation", 0))


def media(server: CloudStorage, name: str, span: str = "", query: str = "") -> tuple[int, bytes]:
    path = f"/storage/v1/b/{BUCKET}/o/{urllib.parse.quote(name, safe='')}?alt=media{query}"
    return ask(server, "GET", path, **({"Range": span} if span else {}))


def test_a_stale_generation_is_412_and_generation_0_is_an_absent_object(server):
    status, first = put(server, "a/b", b"one", "&ifGenerationMatch=0")
    assert status == 200 and put(server, "a/b", b"two", "&ifGenerationMatch=0") == (412, 0)
    assert put(server, "a/b", b"two", f"&ifGenerationMatch={first + 9}") == (412, 0)
    status, second = put(server, "a/b", b"two", f"&ifGenerationMatch={first}")
    assert status == 200 and second > first and media(server, "a/b") == (200, b"two")
    path = f"/storage/v1/b/{BUCKET}/o/a%2Fb?ifGenerationMatch="
    assert ask(server, "DELETE", f"{path}{first}")[0] == 412
    assert ask(server, "DELETE", f"{path}{second}")[0] == 204
    assert ask(server, "DELETE", f"{path}{second}")[0] == 412 and media(server, "a/b")[0] == 404


def test_an_object_that_has_not_changed_is_304(server):
    _, generation = put(server, "a", b"one")
    assert media(server, "a", query=f"&ifGenerationNotMatch={generation}") == (304, b"")
    assert media(server, "a", query="&ifGenerationNotMatch=1") == (200, b"one")


@pytest.mark.parametrize(
    ("span", "status", "data"),
    [
        ("bytes=0-0", 206, b"0"),
        ("bytes=2-4", 206, b"234"),
        ("bytes=7-", 206, b"789"),
        ("bytes=-3", 206, b"789"),
        ("bytes=-30", 206, b"0123456789"),
        ("bytes=8-100", 206, b"89"),
    ],
)
def test_ranges_and_suffixes(server, span, status, data):
    put(server, "a", b"0123456789")
    assert media(server, "a", span) == (status, data)
    assert media(server, "a", "bytes=10-")[0] == 416


def test_lists_are_sorted_cut_in_pages_and_end_before_the_end(server):
    for name in ("b/2", "a", "b/10", "b/1", "c"):
        put(server, name, b"x")
    path = f"/storage/v1/b/{BUCKET}/o?startOffset=b/&endOffset=b0&maxResults=2"
    content = json.loads(ask(server, "GET", path)[1])
    assert [item["name"] for item in content["items"]] == ["b/1", "b/10"]
    rest = json.loads(ask(server, "GET", f"{path}&pageToken={content['nextPageToken']}")[1])
    assert [item["name"] for item in rest["items"]] == ["b/2"] and "nextPageToken" not in rest


def test_a_bucket_that_is_not_there_is_404(server):
    assert ask(server, "GET", "/storage/v1/b/other/o")[0] == 404
    assert ask(server, "POST", "/upload/storage/v1/b/other/o?name=a", b"x")[0] == 404


def test_faults_meet_as_many_requests_as_they_say(server):
    put(server, "a", b"0123456789")
    server.faults = [Fault("alt=media", 503, times=2), Fault("alt=media", cut=3)]
    assert [media(server, "a")[0] for _ in range(2)] == [503, 503]
    with pytest.raises(Exception, match="IncompleteRead|reset|closed"):
        media(server, "a")
    assert media(server, "a") == (200, b"0123456789")
    server.faults = [Fault("POST", -1)]
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        put(server, "a", b"lost answer")
    assert media(server, "a") == (200, b"lost answer")
