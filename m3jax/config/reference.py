"""Documents all config fields: the text of --config_help, and the page docs/config.md.

python -m m3jax.config.reference > docs/config.md
"""

from __future__ import annotations

import textwrap
from typing import Any

from m3jax.config.fields import SECTIONS
from m3jax.config.renamed import RENAMED
from m3jax.errors import ConfigError
from m3jax.printable import cleaned_output

_HEAD = """# Config fields

Every field of a config, made from `m3jax/config/` by `python -m m3jax.config.reference`.
Change one on the command line of any script with `--config.SECTION.FIELD=VALUE`; print this table
there with `--config_help` or `--config_help=SECTION`. In intervals `[` and `]` include the end,
`(` and `)` do not. Integers end at 2147483647 (int32) and numbers of bytes at 2^64 - 1; numbers
with a point are checked as float32, in which they are used. Shapes use the letters of
`m3jax/__init__.py`.
"""


def describe(section: str = "") -> str:
    """Describes the fields of a section ("": all): default, accepted values, meaning with unit.

    Raises:
      ConfigError: there is no such section.
    """
    if section not in SECTIONS:
        known = ", ".join(filter(None, SECTIONS))
        raise ConfigError(f"{section} is no section of the config; known: {known}")
    blocks = []
    for name in [section] if section else SECTIONS:
        lines = []
        for field, (default, meaning, accepted) in SECTIONS[name][1].items():
            values = _accepted(default, accepted)
            choices = " | ".join(map(repr, values)) if isinstance(values, tuple) else values
            path = f"{name}.{field}" if name else field
            lines.append(f"{path} = {default!r}" + (f"    accepts {choices}" if choices else ""))
            lines.append(textwrap.indent(textwrap.fill(meaning, 96), " " * 4))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def markdown() -> str:
    """Returns docs/config.md: one table per section with default, accepted values and meaning."""
    lines = [_HEAD.rstrip()]
    for section, (title, fields) in SECTIONS.items():
        lines += ["", f"## {title}", "", "| field | default | accepted | meaning |"]
        lines.append("|---|---|---|---|")
        for name, (default, meaning, accepted) in fields.items():
            values = _accepted(default, accepted)
            listed = values if isinstance(values, tuple) else (values,)
            choices = ", ".join(f"`{value}`" for value in listed) if values else "text"
            path = f"{section}.{name}" if section else name
            lines.append(f"| `{path}` | `{default!r}` | {choices} | {meaning} |")
    lines += ["", "## Renamed fields", "", "| before | now |", "|---|---|"]
    lines += [f"| `{old}` | `{new.split(' ')[0]}` |" for old, new in RENAMED.items()]
    return "\n".join(lines) + "\n"


def _accepted(default: Any, accepted: Any) -> Any:
    """Returns a field's choices as a tuple, its interval as a string, or None for any text."""
    return (False, True) if isinstance(default, bool) else accepted


if __name__ == "__main__":
    with cleaned_output():
        print(markdown(), end="")
