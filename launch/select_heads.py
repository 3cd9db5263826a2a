"""Ranks heads by how much the loss rises when one of them sees less, and chooses memory heads.

    python launch/select_heads.py --config=configs/wiki_small.py --workdir=runs/wiki
    python launch/select_heads.py --config=configs/wiki_small.py:stage=continual \\
        --workdir=runs/wiki --hide=memory --keep=0.5

A masked head sees only the last --window tokens and the beginning (Memory³ §7), or, with
--hide=memory and a model that reads memories, all but these. The loss is that of the validation
text (`evaluation.batches`). Prints the ranking and the value of config.memory.heads that keeps the
best --keep of the heads in the memory layers; a bank written with it holds their memories alone:

    python launch/write_bank.py … --config.memory.heads=0:1+3,2:0

Draws the heat map and writes all figures as JSON. A stopped run goes on with the same command.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from m3jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, for example configs/….py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, made by launch/prepare.py.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Stage folder, or checkpoints/STEP in it; default WORKDIR/<config.stage>."
)
_HIDE = flags.DEFINE_enum(
    "hide",
    "context",
    ["context", "memory"],
    "What a masked head does not see: older tokens of the context, or the memories.",
)
_WINDOW = flags.DEFINE_integer(
    "window", 100, "Tokens that it still sees, with --hide=context.", lower_bound=1
)
_BY = flags.DEFINE_enum(
    "by",
    "kv",
    ["kv", "query"],
    "Heads to rank: key-value heads with all of their query heads, which is what a bank stores, or"
    " single query heads.",
)
_KEEP = flags.DEFINE_float(
    "keep", 0.5, "Share of the heads in the memory layers to choose, with --by=kv.", 0.0, 1.0
)
_JSON = flags.DEFINE_string(
    "json", None, "The figures; default WORKDIR/report/heads-<hide>-<by>.json."
)
_PNG = flags.DEFINE_string(
    "png", None, "The heat map; default WORKDIR/report/heads-<hide>-<by>.png."
)
cli.define_cache_flag()
flags.adopt_module_key_flags(cli)  # --help shows them


def main(argv: list[str]) -> None:
    """Prints the ranking, draws the map, writes JSON."""
    cli.use_compilation_cache()
    from m3jax.config import validate
    from m3jax.evaluation.plots import head_map
    from m3jax.files import write_atomically
    from m3jax.selection.heads import report, score_heads, table

    config, workdir = validate(_CONFIG.value), Path(str(_WORKDIR.value))
    by_query = _BY.value == "query"
    scores = score_heads(
        config,
        workdir,
        _CHECKPOINT.value,
        hide=_HIDE.value,
        window=_WINDOW.value,
        by_query=by_query,
    )
    first = config.memory.first_layer
    layers = range(first, first + config.memory.layers)
    chosen = [] if by_query else scores.best(float(_KEEP.value or 0), layers)
    found = report(scores, chosen)
    print(table(found))
    if chosen:
        share = f"{len(chosen)} of {config.memory.layers * config.model.kv_heads}"
        print(f"\nthe best {share}: --config.memory.heads={found['memory_heads']}")
    name = f"heads-{_HIDE.value}-{_BY.value}"
    figures = Path(_JSON.value or workdir / "report" / f"{name}.json")
    write_atomically(figures, (json.dumps(found, indent=2) + "\n").encode())
    path = Path(_PNG.value or workdir / "report" / f"{name}.png")
    what = "memories" if _HIDE.value == "memory" else f"all but the last {_WINDOW.value} tokens"
    kind = "query" if by_query else "key-value"
    title = f"One {kind} head at a time without {what}"
    path.parent.mkdir(parents=True, exist_ok=True)
    head_map(path, scores.increase, title, chosen=chosen, layers=layers)
    print(f"figures: {figures}\npicture: {path}")


if __name__ == "__main__":
    cli.run(main, required=["config", "workdir"])
