"""Text from data on its way to a terminal, a page or a picture: cleaned here, once.

Ids, titles, sources and generated texts are written by others. A terminal obeys control characters,
bidirectional controls show text in another order than it has, and markup changes a page.
"""

from __future__ import annotations

import html as _html
import io
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

SHOWN = "·"  # in place of a character that acts on a terminal
# Control characters but tab and line feed; bidirectional controls; line and paragraph separators;
# byte-order mark, interlinear and tag characters; lone surrogates.
_ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_originals: dict[str, str] = {}  # by the folder of the copy
_MARKUP = re.compile(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)|\A[#+>-]")


def clean(text: str) -> str:
    r"""Returns the text without what acts on a terminal, line feeds and tabs kept (\r\n is \n)."""
    return _ACTING.sub(SHOWN, text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """Returns the text as one line: cleaned, with a space for white space of any length."""
    return " ".join(clean(text).split())


def as_markdown(text: str) -> str:
    """Returns the text as one line of Markdown that shows it as it is, in a table's cell, too."""
    escaped = _MARKUP.sub(lambda match: "\\" + match[0], one_line(text))
    return _html.escape(escaped, quote=False)


def as_label(text: str) -> str:
    """Returns the text as one line for a picture, where `$` would begin a formula."""
    return one_line(text).replace("$", r"\$")


def show_as(folder: str, place: str) -> None:
    """Gives a folder, a copy that the user has not named, the name of its original in errors."""
    _originals[folder] = place


def with_originals(text: str) -> str:
    """Returns a message that names originals instead of copies (`show_as`), and then the copies."""
    for folder, place in _originals.items():
        if folder in text:
            text = f"{text.replace(folder, place)} (read from the copy {folder})"
    return text


def complain(text: str) -> None:
    """Prints a text to standard error, cleaned."""
    print(clean(text), file=sys.stderr, flush=True)


def as_html(text: str) -> str:
    """Returns the text as HTML that shows it as it is."""
    return _html.escape(clean(text))


class _Cleaned:
    """Writes cleaned text to another stream, whose other attributes it has."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(clean(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for text in lines:
            self.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def cleaned_output() -> Iterator[None]:
    """Cleans all that is printed to standard output while the block runs.

    What the encodings of standard output and standard error lack is escaped.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    before = sys.stdout
    sys.stdout = _Cleaned(before)
    try:
        yield
    finally:
        sys.stdout = before
