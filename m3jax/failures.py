"""Failures of the machine as errors of the user: full disks, permissions, open files, platforms.

What knows its context raises its own `UserError`. This is for what reaches the end of a script:
exceptions of the system, of TensorStore and of JAX that are no defects of this program.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import traceback
from collections.abc import Iterator

from m3jax.errors import MachineError, UserError

_AGAIN = "run the same command again: what is finished is kept"
# What to do about an error number, after the reason.
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), f"free space there, then {_AGAIN}"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM),
        "run as the owner, or let this user read and write there (chmod, chown)",
    ),
    errno.EROFS: "name a folder that can be written",
    errno.ENOENT: "check the name, and that nothing was moved or deleted",
    errno.ENOTDIR: "a file is where a folder should be: check the name",
    errno.EISDIR: "a folder is where a file should be: check the name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its symbolic links go in a circle",
    errno.EIO: f"check the drive, then {_AGAIN}",
    errno.ESTALE: f"the file server has lost it: mount the drive anew, then {_AGAIN}",
    errno.ENOMEM: f"free memory, then {_AGAIN}",
}
_OPEN_FILES = (errno.EMFILE, errno.ENFILE)
# The machine's, wherever in a chain of exceptions they stand.
_DECISIVE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOMEM, errno.EIO, *_OPEN_FILES)
# Of TensorStore, and of libraries in Rust.
_NUMBERED = re.compile(r"os_error_code='(\d+)'|\(os error (\d+)\)")
_QUOTED = re.compile(r'"([^"]+)"')
_MEMORY = re.compile(r"^RESOURCE_EXHAUSTED: .*([Oo]ut of memory|allocat)")
_PLATFORM = re.compile(r"Unable to initialize backend|Unknown backend|no supported devices found")


def explain(error: BaseException) -> UserError | None:
    """Returns the user error that says what the machine has refused; None for a defect.

    Looks at the exception, its causes and the exceptions of its group. Where these are none of the
    machine's, a full disk, too many open files and the like count also in its context.
    """
    for cause in _chain(error, context=False):
        explained = _of_system(cause, every=True) or _of_others(cause)
        if explained:
            return explained
    for cause in _chain(error, context=True):
        explained = _of_system(cause, every=False)
        if explained:
            return explained
    return None


def raise_if_machine(error: BaseException) -> None:
    """Raises `MachineError` if the machine has refused to read, so that nothing is known of damage.

    To be called where an exception of reading would become an error that names damage, and advises
    to delete what may be whole.
    """
    for cause in _chain(error, context=False):
        number, name = _number_and_name(cause)
        if number in (*_DECISIVE, errno.EACCES, errno.EPERM, errno.ESTALE):
            raise _explained(number, name) from error


def _chain(error: BaseException, context: bool) -> Iterator[BaseException]:
    """Yields an exception and what caused it, each once."""
    left, seen = [error], set[int]()
    while left:
        cause = left.pop(0)
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        left += getattr(cause, "exceptions", ())
        left += [cause.__cause__] if cause.__cause__ else []
        left += [cause.__context__] if context and cause.__context__ else []


def _of_system(error: BaseException, every: bool) -> UserError | None:
    """Explains an exception with an error number of the system; without `every`, `_DECISIVE` ones.

    Of the others, those without a file's name are defects.
    """
    if isinstance(error, UserError):
        return error if every else None
    number, name = _number_and_name(error)
    if number is None or (number not in _DECISIVE and not (every and number in _REMEDIES and name)):
        return None
    return _explained(number, name)


def _number_and_name(error: BaseException) -> tuple[int | None, object]:
    """Returns the system's error number and the file's name in an exception, each None without."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno, error.filename2 or error.filename
    text = str(error)
    inside = _NUMBERED.search(text)
    quoted = _QUOTED.search(text) if inside else None
    if inside:
        return int(inside[1] or inside[2]), quoted[1] if quoted else None
    # Others, such as those of ArrayRecord, have the text alone.
    return next((number for number in _DECISIVE if os.strerror(number) in text), None), None


def _explained(number: int, name: object) -> MachineError:
    reason = os.strerror(number)
    if number in _OPEN_FILES:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return MachineError(
            f"{reason}: this process may have {limit}; raise the limit (ulimit -n {4 * limit}),"
            f" then {_AGAIN}. Nothing is damaged"
        )
    where = f"{os.fsdecode(name)}: " if isinstance(name, (str, bytes)) else ""
    return MachineError(f"{where}{reason}; {_REMEDIES[number]}")


def _of_others(error: BaseException) -> UserError | None:
    """Explains exceptions about memory, platforms of JAX, and text that is none."""
    text = " ".join(str(error).split())
    setting = os.environ.get("JAX_PLATFORMS", "")
    missing = isinstance(error, RuntimeError) and bool(_PLATFORM.search(text))
    if isinstance(error, AssertionError) and setting:  # no plugin of JAX knows the platform
        frames = traceback.extract_tb(error.__traceback__)
        missing = bool(frames) and os.path.basename(frames[-1].filename) == "xla_bridge.py"
        text = "there is no device of this platform"
    if missing:
        given = f"JAX_PLATFORMS={setting}: " if setting else ""
        return MachineError(
            f"{given}{text.partition(' (set ')[0][:200]}; unset JAX_PLATFORMS to take what this"
            " machine has, or install JAX for the accelerator"
        )
    if isinstance(error, MemoryError) or _MEMORY.search(text):
        return MachineError(
            f"not enough memory: {text[:200] or 'allocation failed'}; take fewer or shorter rows at"
            " once (data.batch_size, train.microbatches, --batch), or a machine with more"
        )
    if isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:
        half = ascii(error.object[error.start : error.start + 1])
        near = ascii(error.object[max(0, error.start - 20) : error.start])
        return MachineError(
            f"a text holds {half}, half of a character, after {near}; pair or remove it"
        )
    return None
