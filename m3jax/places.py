"""Paths that a user gives: `~`, URLs, and what must be at a path before a command begins its work.

A flag or config field of a path has a `Place`, which says what stands there and what a command does
with it. `read_path` reads the text of a value; `check_path` looks at the file system and leaves
nothing there. Every path of every script goes through these two.
"""

from __future__ import annotations

import dataclasses
import errno
import glob
import os
import re
import stat
import tempfile
from pathlib import Path

from m3jax.errors import CommandError, UserError

# `gs://b/x`, and `gs:/b/x`, which is what a path makes of it.
_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/")
_BUCKET = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/.*)?")
_SHOWN = 300  # most characters of a flag and its value in a message
_TEMPORARY = 20  # bytes that the name of a temporary file has more than the file's
_LONGEST = 300  # bytes of the longest path that a command makes in a folder


@dataclasses.dataclass(frozen=True)
class Place:
    """Sort of a path.

    Attributes:
      holds: "file", "folder" or "file or folder".
      exists: True if it must exist.
      written: True if a command writes to it; then it is made, with the folders above it.
      made_by: script that makes it, for the message where it is missing.
      schemes: schemes of URLs that are accepted, too; their values stay texts.
      listed: True for a comma-separated list of paths and globs.
      others: regular expression of values that are no paths; all values are then texts.
    """

    holds: str
    exists: bool = True
    written: bool = False
    made_by: str = ""
    schemes: tuple[str, ...] = ()
    listed: bool = False
    others: str = ""

    @property
    def word(self) -> str:
        """Returns the word for a value in `--help`."""
        if self.listed:
            return "FILES"
        return self.holds.upper().replace(" OR ", "|") + ("|URL" if self.schemes else "")


FILE = Place("file")
FOLDER = Place("folder")
FILE_OR_FOLDER = Place("file or folder")
TEXTS = Place("file or folder", listed=True, others="tfds:.*")
FILE_OR_SPLIT = Place("file", others="train|validation")
FOLDER_OR_FUNCTION = Place("folder", others=r"[\w.]+:\w+")
NEW_FILE = Place("file", exists=False, written=True)
NEW_FOLDER = Place("folder", exists=False, written=True)
WORKDIR = Place("folder", made_by="launch/prepare.py")
ANY_WORKDIR = dataclasses.replace(WORKDIR, schemes=("gs",))
NEW_ANY_WORKDIR = dataclasses.replace(NEW_FOLDER, schemes=("gs",))
CHECKPOINT = Place("folder", made_by="launch/train.py", schemes=("gs",))
BANK = Place(
    "folder",
    made_by="launch/write_bank.py",
    schemes=("gs", "s3", "http", "https", "file", "memory"),
)
NEW_BANK = dataclasses.replace(BANK, exists=False, written=True)
CACHE = Place("folder", exists=False, written=True, schemes=("gs", "s3"))


def read_path(
    given: str, text: str | Path, place: Place, error: type[UserError] = CommandError
) -> Path | str:
    """Parses the value of a flag or field; returns a path, or a text where not all values are.

    `~` and `~user` become home folders. A file to write that is a symbolic link becomes its target.

    Args:
      given: flag or field with the value, for messages.
      text: the value.
      place: its sort.
      error: class of the error that is raised.

    Raises:
      UserError: the value is empty, a URL of a scheme that is not accepted, begins with the home of
        an unknown user, or has a NUL character or bytes that are not UTF-8.
    """
    text, given = str(text), _shortened(given)
    if not text.strip():
        hint = " ('.' is this one)" if place.holds == "folder" else ""
        raise error(f"{given.partition('=')[0]} is empty; name a {place.holds}{hint}")
    if place.listed:
        single = dataclasses.replace(place, listed=False)
        parts = [part.strip() for part in text.split(",") if part.strip()]
        return ",".join(str(read_path(given, part, single, error)) for part in parts)
    if place.others and re.fullmatch(place.others, text):
        return text
    if "\0" in text or not is_text(text):
        raise error(f"{given}: the name of a {place.holds} must be UTF-8 without NUL; rename it")
    scheme = _URL.match(text)
    if scheme and scheme[1] in place.schemes and text.startswith("//", scheme.end() - 1):
        if scheme[1] == "gs" and not _BUCKET.fullmatch(text):
            raise error(
                f"{given}: expected gs://BUCKET/FOLDER; names of buckets are at least three of a-z,"
                " 0-9, '.', '_' and '-'"
            )
        return text
    if scheme and scheme[1] in place.schemes:
        raise error(f"{given}: a URL begins with {scheme[1]}://, with two slashes")
    if scheme:
        accepted = " or ".join([f"a local {place.holds}", *(f"{s}://…" for s in place.schemes)])
        bucket = scheme[1] in ("gs", "s3") and "; copy from the bucket, or mount it"
        raise error(f"{given}: {scheme[1]}:// is not supported here; name {accepted}{bucket or ''}")
    path = Path(os.path.expanduser(text))
    if str(path).startswith("~"):
        user = path.parts[0][1:]
        raise error(
            f"{given}: there is no user {user!r} with a home folder; ./~ begins a name with ~"
        )
    if os.path.islink(path) and place == NEW_FILE:
        return Path(os.path.realpath(path))
    return str(path) if place.others else path


def _shortened(given: str) -> str:
    return given if len(given) <= _SHOWN else given[:_SHOWN] + "…"


def is_text(text: str) -> bool:
    """Returns whether a text can be written as UTF-8: whether it has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def encoding_remedy(text: str) -> str:
    """Returns what is wrong with an argument that is no text (`is_text`), and what to do."""
    try:
        os.fsencode(text).decode()
    except UnicodeError:
        return "bytes that are not UTF-8; write them in UTF-8"
    return "the locale of this terminal is not UTF-8; set LC_ALL=C.UTF-8 or PYTHONUTF8=1"


def check_path(
    given: str, path: Path | str, place: Place, error: type[UserError] = CommandError
) -> None:
    """Checks that a path can be read or written as its `place` says; URLs are not checked.

    To know whether a file can be made, one without a name is made and dropped.

    Raises:
      UserError: the path is missing, of another sort or too long; it may not be read; or, where it
        is written, it cannot be made.
    """
    given = _shortened(given)
    if place.listed:
        single = dataclasses.replace(place, listed=False)
        for part in str(path).split(","):
            if os.path.lexists(part) or not glob.has_magic(part):
                check_path(given, read_path(given, part, single, error), single, error)
            elif next(glob.iglob(part, recursive=True), None) is None:
                raise error(f"{given}: no file matches {part}; check the name")
        return
    if isinstance(path, str) and ("://" in path or not place.others):
        return
    if place.others and re.fullmatch(place.others, str(path)):
        return
    path = Path(path)
    try:
        reason = _unfit(path, place)
    except OSError as unfit:
        if unfit.errno in (errno.EMFILE, errno.ENFILE):
            raise  # too many open files: not the path's fault
        verb = ("written" if os.path.lexists(path) else "made") if place.written else "read"
        reason = f" cannot be {verb}: {unfit.strerror}"
    if reason:
        raise error(given + reason)


def _unfit(path: Path, place: Place) -> str:
    """Returns what is wrong with a path, to follow its name in a message; "" if nothing is."""
    mode = _mode(path)
    if mode is None and place.exists:
        made = f"; {place.made_by} makes it" if place.made_by else "; check the name"
        return f": there is no such {place.holds}{made}"
    if mode is not None and stat.S_ISDIR(mode) and place.holds == "file":
        return " is a folder; name a file"
    if mode is not None and not stat.S_ISDIR(mode) and place.holds == "folder":
        return " is a file; name a folder"
    if not place.written:
        needed = os.R_OK | os.X_OK if path.is_dir() else os.R_OK
        allowed = os.access(path, needed, effective_ids=os.access in os.supports_effective_ids)
        return "" if allowed else f" cannot be read: {os.strerror(errno.EACCES)}"
    if mode is not None and not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        return " is no regular file; name one"
    folder = path if place.holds == "folder" else path.parent
    whole = os.path.abspath(folder / ("x" * _LONGEST))
    longest = max((len(os.fsencode(name)) for name in path.parts), default=0)
    if longest > 255 - _TEMPORARY or len(os.fsencode(whole)) > 4096:
        return " cannot be made: its name is too long"
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        return f" cannot be made: {folder} is a file"
    with tempfile.TemporaryFile(dir=folder):
        return ""


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None
