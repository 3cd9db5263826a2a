"""The rooms of the package: CONTRIBUTING.md shows the contracts that the import linter holds."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def contracts() -> list[dict]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["tool"]["importlinter"]["contracts"]


def test_contributing_shows_the_layers() -> None:
    (layers,) = (contract["layers"] for contract in contracts() if contract["type"] == "layers")
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8").split("## Rooms")[1]
    rows = [row.split("|")[1] for row in text.splitlines() if row.startswith("| `")]
    shown = [re.findall(r"`(\w+)`", row) for row in rows]
    assert shown == [layer.split(" | ") for layer in layers]


def test_every_file_and_folder_has_a_room() -> None:
    (layers,) = (contract["layers"] for contract in contracts() if contract["type"] == "layers")
    rooms = {room for layer in layers for room in layer.split(" | ")}
    paths = [path for path in (ROOT / "m3jax").iterdir() if not path.name.startswith("_")]
    assert rooms == {path.stem for path in paths if path.is_dir() or path.suffix == ".py"}


def test_no_import_hides_from_the_linter() -> None:
    """Imports under TYPE_CHECKING would be circles that nobody sees."""
    hidden = [
        str(path.relative_to(ROOT))
        for folder in ("m3jax", "launch")
        for path in (ROOT / folder).rglob("*.py")
        if "TYPE_CHECKING" in path.read_text("utf-8")
    ]
    assert not hidden
