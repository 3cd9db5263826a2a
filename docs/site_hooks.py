"""Hooks of the documentation site: a page of the API for each room, links to source files."""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).parents[1] / "m3jax"


def rooms() -> dict[str, list[str]]:
    """Returns the modules of each room, by the room's name."""
    pages: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names = parts[:-1] if parts[-1] == "__init__" else parts
        if len(names) > 1:
            pages.setdefault(names[1], []).append(".".join(names))
    return pages


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the pages of the API to the navigation."""
    assert config.nav is not None
    config.nav = [*config.nav, {"API": [{room: f"api/{room}.md"} for room in rooms()]}]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Makes a page for each room."""
    for room, modules in rooms().items():
        lines = [f"# {room}", ""]
        for module in modules:
            lines += [f"::: {module}", "    options:", "      heading_level: 2"]
            if module == f"m3jax.{room}":  # the page has its name already
                lines += ["      show_root_heading: false", "      show_root_toc_entry: false"]
            lines.append("")
        files.append(File.generated(config, f"api/{room}.md", content="\n".join(lines)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Points links to source files at the pages of the API."""
    markdown = re.sub(r"\]\(\.\./m3jax/(\w+)[\w/]*(\.py)?\)", r"](api/\1.md)", markdown)
    return re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", markdown)
