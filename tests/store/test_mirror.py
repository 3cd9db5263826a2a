"""A workdir in a bucket has a mirror on each host: whole, checked, resumed, and never mixed."""

import concurrent.futures
import shutil
from pathlib import Path

import numpy as np
import processes
import pytest
from store.cloud_storage import BUCKET, CloudStorage, Fault

from m3jax import mirror as mirrors
from m3jax.errors import LockError, StoreError
from m3jax.mirror import Mirror
from m3jax.store import Store

URL = f"gs://{BUCKET}/runs/wiki"


@pytest.fixture
def server(quick_server: CloudStorage, monkeypatch: pytest.MonkeyPatch) -> CloudStorage:
    monkeypatch.setattr(mirrors, "_OBJECT", 3000)
    monkeypatch.setattr(mirrors, "_PIECE", 700)
    return quick_server


def fill(folder: Path, seed: int) -> dict[str, bytes]:
    """Writes files of a part, and files that stay local; returns the former."""
    random = np.random.default_rng(seed)
    sizes = {"a": 5000, "deep/b": 3000, "empty": 0, "manifest.json": 40, f"only-{seed}": 7}
    contents = {name: random.bytes(size) for name, size in sizes.items()}
    for name, data in {**contents, "lock": b"me", "a.tmp": b"x", "begun.json": b"y"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return contents


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def written(server: CloudStorage, word: str = "POST") -> list[str]:
    return [line for line, _ in server.requests if line.startswith(word)]


def media(server: CloudStorage) -> list[str]:
    """Names of the objects whose bytes were read, without manifests."""
    lines = [line for line, _ in server.requests if "alt=media" in line]
    return [line for line in lines if ".json" not in line or "manifest.json" in line]


@pytest.fixture
def published(server: CloudStorage, tmp_path: Path) -> tuple[Mirror, dict[str, bytes]]:
    first = Mirror(URL, tmp_path / "first")
    contents = fill(first.local / "references", 1)
    first.publish("references")
    return first, contents


def test_a_published_part_is_on_another_host_what_it_was(published, server, tmp_path):
    first, contents = published
    names = server.buckets[BUCKET].keys()
    prefix = "runs/wiki/references/"
    pieces = {f"{prefix}a/00000", f"{prefix}a/00001"}
    whole = {prefix + name for name in contents if name != "a"}
    assert names == pieces | whole | {prefix + "published.json"}
    second = Mirror(f"{URL}/", tmp_path / "second")
    assert second.has("references") and not second.has("index")
    second.fetch("references")
    assert files_of(second.local / "references") == contents
    assert first.url("bank") == second.url("bank") == f"{URL}/bank"
    assert Mirror.of(second.local).place == URL and Mirror.of(second.local).local == second.local


def test_what_is_here_is_not_copied_again(published, server, tmp_path):
    first, contents = published
    second = Mirror(URL, tmp_path / "second")
    second.fetch("references")
    server.requests.clear()
    for mirror in (first, second):
        mirror.fetch("references")
        mirror.publish("references")
    assert not media(server) and not written(server)
    damaged = second.local / "references" / "deep" / "b"
    for change in (damaged.unlink, lambda: damaged.write_bytes(bytes(3000))):
        change()
        second.fetch("references")
        assert files_of(second.local / "references") == contents


@pytest.mark.parametrize("record", [b"", b"\x00{", b"[]", b'{"published": 1}', b'{"held": 3}'])
def test_a_damaged_record_of_a_copy_is_no_copy(published, server, tmp_path, record):
    _, contents = published
    second = Mirror(URL, tmp_path / "second")
    second.fetch("references")
    second._record_path("references").write_bytes(record)
    second.fetch("references")
    assert files_of(second.local / "references") == contents


def test_a_local_workdir_is_its_own_mirror(tmp_path):
    mirror = Mirror(tmp_path / "run", tmp_path / "cache")
    assert not mirror.in_bucket and mirror.local == tmp_path / "run" == Path(mirror.place)
    mirror.fetch("references")
    mirror.publish("references")
    assert mirror.url("bank") == tmp_path / "run" / "bank" and not mirror.has("bank")
    assert mirror.swap("versions/current.json", b"x") and mirror.has("versions/current.json")
    assert Mirror.of(tmp_path / "run").local == tmp_path / "run"
    mirror.delete("versions")
    assert not mirror.has("versions") and not (tmp_path / "cache").exists()
    with mirror.only_writer(), pytest.raises(LockError), mirror.only_writer():
        pass


def test_what_is_published_anew_takes_the_place_of_the_copy(published, server, tmp_path):
    first, before = published
    second = Mirror(URL, tmp_path / "second")
    second.fetch("references")
    shutil.rmtree(first.local / "references")
    contents = fill(first.local / "references", 2)
    first.publish("references")
    second.fetch("references")
    assert files_of(second.local / "references") == contents != before
    assert "runs/wiki/references/only-1" not in server.buckets[BUCKET]


def test_a_killed_copy_goes_on_where_it_ended(published, server, tmp_path, monkeypatch):
    _, contents = published
    second = Mirror(URL, tmp_path / "second")
    real, count = Store.read_spans, 0

    def dying(store, spans):
        nonlocal count
        for data in real(store, spans):
            count += 1
            if count == 6:
                raise KeyboardInterrupt
            yield data

    monkeypatch.setattr(mirrors, "THREADS", 1)
    monkeypatch.setattr(Store, "read_spans", dying)
    with pytest.raises(KeyboardInterrupt):
        second.fetch("references")
    assert not (second.local / "references").exists()
    server.requests.clear()
    second.fetch("references")
    assert files_of(second.local / "references") == contents
    pieces = sum(max(1, -(-len(data) // 700)) for data in contents.values() if data)
    assert len(media(server)) < pieces - 3


def test_a_killed_publication_is_not_there_and_goes_on(published, server, tmp_path):
    first, _ = published
    shutil.rmtree(first.local / "references")
    contents = fill(first.local / "references", 2)
    server.faults = [Fault("POST .*manifest.json", 403, times=1e9)]
    with pytest.raises(StoreError, match="access denied"):
        first.publish("references")
    second = Mirror(URL, tmp_path / "second")
    assert not second.has("references")
    with pytest.raises(StoreError, match="nothing is finished at .*references"):
        second.fetch("references")
    server.faults = []
    server.requests.clear()
    first.publish("references")
    uploads = [line for line in written(server) if "publish" not in line]
    assert len(uploads) < len(contents)
    second.fetch("references")
    assert files_of(second.local / "references") == contents


def test_a_part_published_over_a_half_published_other_is_whole(server, tmp_path):
    first, second = Mirror(URL, tmp_path / "first"), Mirror(URL, tmp_path / "second")
    fill(first.local / "index", 1)
    server.faults = [Fault("POST .*/published.json", 403, times=1e9)]
    with pytest.raises(StoreError):
        first.publish("index")
    server.faults = []
    contents = fill(second.local / "index", 2)
    second.publish("index")
    first.fetch("index")
    assert files_of(first.local / "index") == contents


def test_a_damaged_object_is_refused_and_not_kept(published, server, tmp_path):
    second = Mirror(URL, tmp_path / "second")
    for data, message in ((bytes(3000), "deep/b is damaged"), (b"short", "shorter than it was")):
        Store(URL).write("references/deep/b", data)
        with pytest.raises(StoreError, match=message):
            second.fetch("references")
        assert not (second.local / "references").exists()
    first, contents = published
    Store(URL).delete("references/published.json")
    first.publish("references")  # the remedy of the message
    second.fetch("references")
    assert files_of(second.local / "references") == contents
    Store(URL).write("references/published.json", b"no JSON")
    with pytest.raises(StoreError, match=r"published.json is damaged; delete it"):
        second.fetch("references")


def test_a_copy_without_room_is_refused_before_it_begins(published, server, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9, 5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    server.requests.clear()
    with pytest.raises(StoreError, match=r"free, and .* needs .*--cache_dir"):
        Mirror(URL, tmp_path / "second").fetch("references")
    assert not media(server)


def test_a_copy_says_what_it_copies(published, tmp_path, capfd):
    second = Mirror(URL, tmp_path / "second")
    second.fetch("references")
    assert f"copying 0.0 MB from {URL} to {second.local}: references" in capfd.readouterr().err
    second.fetch("references")
    assert capfd.readouterr().err == ""


def test_failing_requests_change_nothing(server, tmp_path):
    server.faults = [
        Fault(".", 503, times=1e9, share=0.15),
        Fault("POST|alt=media", cut=100, times=1e9, share=0.1),
    ]
    first = Mirror(URL, tmp_path / "first")
    contents = fill(first.local / "references", 1)
    first.publish("references")
    second = Mirror(URL, tmp_path / "second")
    second.fetch("references")
    assert files_of(second.local / "references") == contents


def test_of_the_processes_of_a_host_one_copies(published, server, tmp_path):
    _, contents = published
    server.requests.clear()
    code = (
        "import sys; from m3jax.mirror import Mirror\n"
        "mirror = Mirror(sys.argv[1], sys.argv[2]); mirror.fetch('references')\n"
        "print(mirror.local)"
    )
    started = [processes.start(["python", "-c", code, URL, tmp_path / "host"]) for _ in range(3)]
    outputs = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], outputs
    (local,) = {Path(output.strip()) for output, _ in outputs}
    assert files_of(local / "references") == contents
    read = [line.partition("?")[0] for line in media(server) if "manifest" not in line]
    assert len(read) == len(set(read)) == 4  # "a" in two objects, "deep/b", "only-1"


def test_a_process_killed_while_it_copies_leaves_no_part(published, server, tmp_path):
    _, contents = published
    server.faults = [Fault("GET .*deep/b", delay=60.0, status=200)]
    code = "import sys; from m3jax.mirror import Mirror; Mirror(*sys.argv[1:]).fetch('references')"
    process = processes.start(["python", "-c", code, URL, tmp_path / "host"])
    mirror = Mirror(URL, tmp_path / "host")
    while not any("deep/b" in line for line in media(server)):
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not (mirror.local / "references").exists()
    server.faults = []
    mirror.fetch("references")
    assert files_of(mirror.local / "references") == contents


def test_a_process_killed_while_it_publishes_leaves_what_another_goes_on_with(server, tmp_path):
    first = Mirror(URL, tmp_path / "host")
    contents = fill(first.local / "references", 1)
    server.faults = [Fault("POST .*manifest.json", delay=60.0, status=200)]
    code = (
        "import sys; from m3jax.mirror import Mirror; Mirror(*sys.argv[1:]).publish('references')"
    )
    process = processes.start(["python", "-c", code, URL, tmp_path / "host"])
    while not any("manifest.json" in line for line in written(server)):
        assert process.poll() is None
    process.kill()
    process.wait()
    server.faults = []
    second = Mirror(URL, tmp_path / "second")
    assert not second.has("references")
    first.publish("references")
    second.fetch("references")
    assert files_of(second.local / "references") == contents


def test_a_file_is_a_part(server, tmp_path):
    first, second = Mirror(URL, tmp_path / "first"), Mirror(URL, tmp_path / "second")
    (first.local / "report").mkdir()
    (first.local / "report" / "loss.json").write_text("1")
    first.publish("report/loss.json")
    second.fetch("report/loss.json")
    assert (second.local / "report" / "loss.json").read_text() == "1"
    assert second.has("report/loss.json")
    second.delete("report/loss.json")
    assert not first.has("report/loss.json") and not (second.local / "report/loss.json").exists()


def test_of_two_that_swap_a_file_one_wins(server, tmp_path):
    name = "versions/current.json"
    hosts = [Mirror(URL, tmp_path / str(i)) for i in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        won = [*pool.map(lambda i: hosts[i].swap(name, f"mine {i}".encode()), range(4))]
    assert sum(won) == 1
    winner = won.index(True)
    assert Store(URL).read(name) == f"mine {winner}".encode()
    assert [(host.local / name).exists() for host in hosts] == won
    loser = hosts[winner - 1]
    loser.fetch(name)
    assert loser.swap(name, b"later") and not hosts[winner].swap(name, b"too late")


def test_writers_of_two_hosts_exclude_each_other(server, tmp_path, monkeypatch):
    first, second = Mirror(URL, tmp_path / "first"), Mirror(URL, tmp_path / "second")
    lease = mirrors.Lease
    monkeypatch.setattr(mirrors, "Lease", lambda *given: lease(*given, seconds=2.0))
    with first.only_writer():
        with pytest.raises(StoreError, match="another process is writing"), second.only_writer():
            pass
        with pytest.raises(LockError, match=URL), Mirror(URL, tmp_path / "first").only_writer():
            pass
        first.check()
        Store(URL).write("lock", b"other 1")
        fill(first.local / "index", 1)
        lost = mirrors._leases[URL]
        lost._renewal.join(20)
        with pytest.raises(StoreError, match="another one may be writing"):
            first.publish("index")
        with pytest.raises(StoreError, match="another one may be writing"):
            first.swap("versions/current.json", b"x")
    assert not second.has("index") and not second.has("versions/current.json")
    first.check()  # without a lease nothing can be lost


def test_the_cache_is_in_the_users_cache(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tmp_path / "xdg" / "m3jax" in Mirror(URL).local.parents
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert mirrors.default_cache() == tmp_path / "home" / ".cache" / "m3jax"
