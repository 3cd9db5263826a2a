"""Whether a fact is found again in a text longer than the model's context, with and without memory.

    python launch/needle.py --config=configs/quickstart.py:stage=continual \\
        --workdir=runs/quickstart --needles=runs/quickstart/text/needles.jsonl \\
        --lengths=60,120,240,480,960,1920 --window=20 --cut=10 --picture=needle.png

Needles are JSON lines with `needle`, `prompt` and `answer`. Each is hidden among references of the
knowledge base (or of --haystack), the prompt follows at the end, and the model generates. Of a text
longer than its context it reads the last --window tokens; older text is cut into memories of at
most --cut tokens, which it recalls, or it is forgotten.
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
_NEEDLES = flags.DEFINE_string("needles", None, "File of needles, .jsonl.")
_HAYSTACK = flags.DEFINE_string(
    "haystack",
    None,
    "Folder of references to hide them among, as launch/prepare.py makes; default the knowledge"
    " base.",
)
_LENGTHS = flags.DEFINE_list("lengths", ["512", "1024", "2048", "4096"], "Tokens of the texts.")
_COUNT = flags.DEFINE_integer("count", 64, "Texts of each length.", lower_bound=1)
_WINDOW = flags.DEFINE_integer(
    "window", None, "Tokens that stay as they are; default half of the context.", lower_bound=1
)
_CUT = flags.DEFINE_integer(
    "cut",
    None,
    "Most tokens of a memory of the older text; default config.memory.reference_length.",
    lower_bound=1,
)
_BATCH = flags.DEFINE_integer("batch", 16, "Texts generated together.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")
_JSON = flags.DEFINE_string("json", None, "Write the figures to this file.")
_PICTURE = flags.DEFINE_string("picture", None, "Write a picture (PNG) to this file.")
cli.define_cache_flag()
flags.adopt_module_key_flags(cli)  # --help shows them
flags.register_validator(
    "lengths",
    lambda lengths: all(length.isdigit() and int(length) > 0 for length in lengths),
    "a list of numbers of tokens, for example 512,1024",
)


def main(argv: list[str]) -> None:
    """Prints a table; writes JSON and a picture."""
    cli.use_compilation_cache()
    from m3jax.config import validate
    from m3jax.evaluation.needle import needle_test, read_needles, table
    from m3jax.evaluation.plots import needle_lines
    from m3jax.files import write_atomically
    from m3jax.inference.session import Session
    from m3jax.text.references import References

    needles = read_needles(str(_NEEDLES.value))
    session = Session(
        validate(_CONFIG.value), Path(str(_WORKDIR.value)), checkpoint=_CHECKPOINT.value
    )
    report = needle_test(
        session,
        needles,
        References.open(_HAYSTACK.value) if _HAYSTACK.value else session.references,
        [int(length) for length in _LENGTHS.value or []],
        count=_COUNT.value,
        window=_WINDOW.value,
        cut=_CUT.value,
        batch=_BATCH.value,
        seed=_SEED.value,
    )
    print(table(report))
    if _JSON.value:
        write_atomically(Path(_JSON.value), (json.dumps(report, indent=2) + "\n").encode())
    if _PICTURE.value:
        needle_lines(Path(_PICTURE.value), report)


if __name__ == "__main__":
    cli.run(main, required=["config", "workdir", "needles"])
