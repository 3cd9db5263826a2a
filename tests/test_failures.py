"""What the machine refuses ends in one line of a user error, and a defect does not."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import tensorstore as ts

from m3jax.errors import MachineError, TextError, UserError
from m3jax.failures import explain


def failed(act: Callable[[], Any]) -> BaseException:
    """The exception that an act raises."""
    with pytest.raises(BaseException) as caught:
        act()
    return caught.value


def from_cause(error: BaseException, cause: BaseException) -> BaseException:
    def act() -> None:
        raise error from cause

    return failed(act)


def while_handling(error: BaseException, first: BaseException) -> BaseException:
    def act() -> None:
        try:
            raise first
        except BaseException:
            raise error  # noqa: B904

    return failed(act)


def numbered(number: int, *name: str) -> OSError:
    return OSError(number, os.strerror(number), *name)


FULL, DENIED = numbered(errno.ENOSPC), numbered(errno.EACCES, "/a")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FULL, ["No space left on device", "free space", "same command again"]),
        (DENIED, ["/a: Permission denied", "chmod"]),
        (numbered(errno.EROFS, "/a"), ["/a: Read-only file system", "name a folder"]),
        (numbered(errno.EMFILE, "/a"), ["Too many open files", "ulimit -n", "Nothing is damaged"]),
        (numbered(errno.ENOENT, "/a"), ["/a: No such file", "check the name"]),
        (numbered(errno.EISDIR, "/a"), ["/a: Is a directory"]),
        (numbered(errno.ENOTDIR, "/a"), ["/a: Not a directory"]),
        (numbered(errno.ENAMETOOLONG, "/a"), ["/a: File name too long", "shorter"]),
        (from_cause(ValueError("of a library"), DENIED), ["/a: Permission denied"]),
        (from_cause(RuntimeError(), from_cause(KeyError("a"), FULL)), ["No space left"]),
        (while_handling(KeyError("a"), FULL), ["No space left"]),
        (BaseExceptionGroup("several", [ValueError("b"), FULL]), ["No space left"]),
        (failed(lambda: "\ud800".encode()), [r"\ud800", "half of a character"]),
        (MemoryError("Unable to allocate 2 TiB"), ["not enough memory", "2 TiB", "--batch"]),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), ["9 bytes"]),
        (from_cause(KeyError("a"), TextError("b.txt is empty")), ["b.txt is empty"]),
        (
            RuntimeError("Unable to initialize backend 'x': no (set JAX)"),
            ["'x': no; unset JAX_PLA"],
        ),
    ],
    ids=lambda value: None if isinstance(value, list) else repr(value)[:60],
)
def test_failures_of_the_machine_are_explained(error: BaseException, words: list[str]) -> None:
    explained = explain(error)
    assert isinstance(explained, UserError) and "\n" not in str(explained)
    assert all(word in str(explained) for word in words), explained


@pytest.mark.parametrize(
    "error",
    [
        KeyError("a"),
        AssertionError(),
        numbered(errno.ENOENT),
        numbered(errno.EBADF, "/a"),
        OSError("no number"),
        while_handling(KeyError("a"), numbered(errno.ENOENT, "/a")),
        while_handling(KeyError("a"), TextError("b")),
        RuntimeError("of another kind"),
        failed(lambda: "é".encode("ascii")),
    ],
    ids=repr,
)
def test_defects_are_not(error: BaseException) -> None:
    assert explain(error) is None


def test_every_number_with_a_remedy_has_one_line() -> None:
    for number in errno.errorcode:
        explained = explain(numbered(number, "/a"))
        assert explained is None or (
            isinstance(explained, MachineError) and os.strerror(number) in str(explained)
        )


def test_errors_of_tensorstore_are_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = ts.KvStore.open({"driver": "file", "path": f"{tmp_path}/file/"}).result()
    error = failed(lambda: store.write("a", b"b").result())
    explained = explain(error)
    assert isinstance(explained, MachineError) and "Not a directory" in str(explained), error
    assert str(tmp_path / "file") in str(explained)


def test_a_platform_that_is_not_there_is_named_before_any_work(tmp_path: Path) -> None:
    command = ["python", "launch/quickstart.py", f"--workdir={tmp_path}/new"]
    done = processes.call(command, env={"JAX_PLATFORMS": "cuda"})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("MachineError: JAX_PLATFORMS=cuda: ")
    assert not (tmp_path / "new").exists()
