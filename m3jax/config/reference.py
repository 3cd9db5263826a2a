"""Reference of all config fields, as the page docs/config.md.

python -m m3jax.config.reference > docs/config.md
"""

from __future__ import annotations

from m3jax.config.fields import FIELDS, RENAMED

# Headings of the sections, in the order of the page; "" holds the fields of no section.
SECTIONS = {
    "": "Run",
    "model": "model: shape and attention",
    "memory": "memory: explicit memories and how they are read",
    "writer": "writer: memories in the bank",
    "text": "text: tokenizer and corpus",
    "clean": "clean: repair and filters of documents",
    "knowledge": "knowledge: filters of references",
    "retrieval": "retrieval: embedder, index, overlap",
    "data": "data: rows and their loading",
    "chat": "chat: template and limits of chats",
    "preference": "preference: DPO",
    "optimizer": "optimizer: update rule and learning rate",
    "train": "train: steps, checkpoints, evaluation",
    "guard": "guard: the stability guard",
    "evaluation": "evaluation: validation losses",
    "mesh": "mesh: devices",
}

_HEAD = """# Config fields

Every field of a config, made from `m3jax/config/fields.py` by `python -m m3jax.config.reference`.
Change one on the command line of any script with `--config.SECTION.FIELD=VALUE`; print this table
there with `--config_help` or `--config_help=SECTION`. In intervals `[` and `]` include the end,
`(` and `)` do not. Shapes use the letters of `m3jax/__init__.py`.
"""


def markdown() -> str:
    """Returns the page: one table a section with default, accepted values and meaning."""
    lines = [_HEAD.rstrip()]
    for section, title in SECTIONS.items():
        lines += ["", f"## {title}", "", "| field | default | accepted | meaning |"]
        lines.append("|---|---|---|---|")
        for path, (default, meaning, accepted) in FIELDS.items():
            owner, _, _ = path.rpartition(".")
            if owner == section:
                lines.append(
                    f"| `{path}` | `{default!r}` | {_accepted(default, accepted)} | {meaning} |"
                )
    lines += ["", "## Renamed fields", "", "| before | now |", "|---|---|"]
    lines += [f"| `{old}` | `{new.split(' ')[0]}` |" for old, new in RENAMED.items()]
    return "\n".join(lines) + "\n"


def _accepted(default: object, accepted: object) -> str:
    if isinstance(accepted, tuple):
        return ", ".join(f"`{value}`" for value in accepted)
    if isinstance(accepted, str):
        return f"`{accepted}`"
    return "`True`, `False`" if isinstance(default, bool) else "text"


if __name__ == "__main__":
    print(markdown(), end="")
