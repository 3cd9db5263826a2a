"""The page of all config fields is made from them."""

from pathlib import Path

from m3jax.config.fields import FIELDS
from m3jax.config.reference import markdown

PAGE = Path(__file__).parents[1] / "docs" / "config.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text("utf-8") == markdown(), (
        "run: python -m m3jax.config.reference > docs/config.md"
    )


def test_every_field_is_on_the_page() -> None:
    assert all(markdown().count(f"| `{path}` | `{FIELDS[path][0]!r}` |") == 1 for path in FIELDS)
