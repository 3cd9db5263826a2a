"""Text from data: no character acts on a terminal, no markup changes a page."""

import ast
import html.parser
import io
import re
import sys
import unicodedata
from pathlib import Path

import processes
import pytest

from m3jax.printable import as_html, as_markdown, clean, cleaned_output, one_line

EVIL = "\x1b[31m<script>|`\u202e"


def test_what_acts_on_a_terminal_is_shown_as_a_dot() -> None:
    """Every character of the categories that act is replaced, but those that words need."""
    needed = {"\n", "\t", "\u00ad", "\u200b", "\u200c", "\u200d"}  # hyphens and joiners
    blocks = (0, 0x3000), (0xD800, 0xE000), (0xFE00, 0x10000), (0xE0000, 0xE0100)
    for number in (number for block in blocks for number in range(*block)):
        letter = chr(number)
        acts = unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")
        acts |= unicodedata.bidirectional(letter) in (
            *("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"),
        )
        acts |= letter in "\u061c\u200e\u200f\ufeff" or 0xE0000 <= number < 0xE0080
        assert (clean(letter) != letter) == (acts and letter not in needed) or (
            0xFFF9 <= number <= 0xFFFB
        ), hex(number)
    assert clean("a\r\nb\rc\td") == "a\nb·c\td"
    assert clean("Größe 日本 👩‍👩‍👧 नमस्ते می‌خواهم") == "Größe 日本 👩‍👩‍👧 नमस्ते می‌خواهم"


def test_one_line_has_no_line_ends() -> None:
    assert one_line(" a\r\n\tb\x85c\u2028d \n") == "a b·c·d"


def test_markdown_has_no_markup() -> None:
    text = "# a|b *c* _d_ `e` <i>f</i> [g](h) $x$ ~~k~~ &amp; \\"
    shown = as_markdown(text)
    assert "<" not in shown and "&amp;amp;" in shown
    for mark in "#|*_`[]$~\\":
        assert shown.count("\\" + mark) >= text.count(mark)
    assert as_markdown("nq_open_dev 3-4 (#5)") == "nq_open_dev 3-4 (#5)"
    assert as_markdown(EVIL + "\n| x") == "·\\[31m&lt;script&gt;\\|\\`· \\| x"


def test_html_has_no_tags() -> None:
    class Reader(html.parser.HTMLParser):
        tags, text = 0, ""

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.tags += 1

        def handle_data(self, data: str) -> None:
            self.text += data

    reader = Reader()
    reader.feed(f'<p title="{as_html(EVIL)}">{as_html(EVIL)}</p>')
    reader.close()
    assert reader.tags == 1 and reader.text == "·[31m<script>|`·"


ROOT = Path(__file__).parents[1]
# Modules that write pages of figures and of names of their own, no text from data.
OWN_WORDS = {
    "m3jax/quickstart/chat.py": "shares",
    "m3jax/quickstart/run.py": "shares",
    "m3jax/sweep/run.py": "names of a sweep's Python file",
    "launch/compile.py": "names of slices",
    "launch/quickstart.py": "prints the pages of the quickstarts",
    "launch/sweep.py": "names the file of m3jax/sweep",
    "launch/generate.py": "names the file of m3jax/inference",
}


def test_every_page_is_cleaned() -> None:
    """A module that writes Markdown or HTML cleans what it writes, or is listed with the reason."""
    strange = []
    for path in sorted([*(ROOT / "m3jax").rglob("*.py"), *(ROOT / "launch").glob("*.py")]):
        text, name = path.read_text("utf-8"), path.relative_to(ROOT).as_posix()
        tree = ast.walk(ast.parse(text))
        words = [node.value for node in tree if isinstance(node, ast.Constant)]
        pages = [
            w for w in words if isinstance(w, str) and re.search(r"^[\w-]+\.(md|html)$|<html", w)
        ]
        pages += [w for w in words if w in ("markdown", "html")]
        cleaned = "import as_html" in text or "import as_markdown" in text
        if pages and not cleaned and name not in OWN_WORDS and "printable" not in name:
            strange.append(f"{name}: {pages}")
    assert not strange, strange


def test_errors_are_printed_in_one_place() -> None:
    """Standard error is not cleaned as a whole: progress bars move its cursor."""
    allowed = ("m3jax/printable.py", "m3jax/train/clock.py")  # clock: bars
    for path in sorted([*(ROOT / "m3jax").rglob("*.py"), *(ROOT / "launch").glob("*.py")]):
        if path.relative_to(ROOT).as_posix() not in allowed:
            assert "file=sys.stderr" not in path.read_text("utf-8"), path


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_output_is_cleaned_and_always_written(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    data = io.BytesIO()
    stream = io.TextIOWrapper(data, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    with cleaned_output():
        print(EVIL, "Größe \ud800 日本", end="", flush=True)
        sys.stdout.writelines(["\x07", "."])
        print(EVIL, file=sys.stdout)
        assert sys.stdout.isatty() is False and sys.stdout.encoding == encoding
    assert sys.stdout is stream
    stream.flush()
    text = data.getvalue().decode(encoding)
    assert not set(text) & {"\x1b", "\u202e", "\x07"}
    assert "[31m<script>|`" in text and ("Gr" in text)
    if encoding == "utf-8":
        assert "Größe · 日本·." in text
    if encoding == "ascii":
        assert "Gr\\xf6\\xdfe \\xb7 \\u65e5\\u672c" in text


SCRIPT = '''"""Prints."""
from m3jax import cli
from m3jax.errors import TextError
from m3jax.printable import complain

EVIL = "\\x1b[31m<script>|`\\u202e\\udcff"
COMMANDS = cli.Commands()


@COMMANDS.add()
def main(given):
    """Prints what is hostile."""
    print(EVIL)
    raise TextError(f"{EVIL} is no text")


cli.run(__doc__, COMMANDS)
'''


def test_a_script_on_an_ascii_terminal(tmp_path: Path) -> None:
    """What a command prints, and its error, are cleaned without its help; no traceback."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = processes.start(["python", script], env={"PYTHONIOENCODING": "ascii"})
    output, error = process.communicate(timeout=processes.HANG)
    assert process.returncode == 2, error
    assert output == "\\xb7[31m<script>|`\\xb7\\xb7\n"
    assert error == "TextError: \\xb7[31m<script>|`\\xb7\\xb7 is no text\n"
