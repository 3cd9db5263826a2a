"""Words of the code: how docstrings begin, names that hide a thing, sizes of files and
functions."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path for folder in ("m3jax", "launch", "configs") for path in (ROOT / folder).rglob("*.py")
)
QUESTIONS = ("What", "Whether", "Which", "How", "Who", "Where")
HIDING = {"found", "one", "wanted", "asked", "those", "here"}  # pronouns: of which thing?


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_names_say_what_they_are(path: Path) -> None:
    text = path.read_text("utf-8")
    assert text.count("\n") <= 500, "more than one concept"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            words = (ast.get_docstring(node) or "_").split()
            assert words[0] not in QUESTIONS, " ".join(words[:8])
        if isinstance(node, ast.FunctionDef):
            first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
            assert node.end_lineno is not None and node.end_lineno - first.lineno < 80, node.name
        if isinstance(node, ast.arg):
            assert node.arg not in HIDING, node.lineno
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            assert node.id not in HIDING, node.lineno


def test_rooms_stay_small() -> None:
    lines = {path: path.read_text("utf-8").count("\n") for path in FILES}
    rooms: dict[str, int] = {}
    for path, count in lines.items():
        room = "/".join(path.relative_to(ROOT).parts[:2])
        rooms[room] = rooms.get(room, 0) + count
    large = {room: n for room, n in rooms.items() if n > 0.15 * sum(lines.values())}
    assert not large
    evaluation = ROOT / "m3jax" / "evaluation"
    assert len(list(evaluation.glob("*.py"))) <= 17  # sixteen and __init__.py
