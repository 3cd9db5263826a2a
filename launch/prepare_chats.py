r"""Prepares chats for SFT, or preference pairs for DPO, in a workdir that has a tokenizer.

    python launch/prepare_chats.py --config=configs/wiki_small.py:stage=sft --workdir=runs/wiki \
        --chats=chats.jsonl
    python launch/prepare_chats.py --config=configs/wiki_small.py:stage=dpo --workdir=runs/wiki \
        --chats=pairs.jsonl

Lines are chats (messages, ShareGPT conversations, prompt and response) or pairs (prompt, chosen,
rejected); m3jax/text/chat/chats.py lists the forms. What cannot be used is left out and reported,
or,
where it is more than config.chat.bad_share, refused with file and line. A finished part is kept.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from m3jax import cli
from m3jax.config import validate, with_epochs

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file of the stage, for example configs/wiki_small.py:stage=sft."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, made by launch/prepare.py.")
_CHATS = flags.DEFINE_string(
    "chats", None, "Chats or pairs: comma-separated .jsonl or .jsonl.gz files, globs, folders."
)


def main(argv: list[str]) -> None:
    """Writes the corpora and prints the report."""
    from m3jax.data.packed import PackedRows
    from m3jax.text.chat.corpus import REPORT, describe, prepare_chats
    from m3jax.text.corpus import Corpus

    config = validate(_CONFIG.value)
    workdir, kind = Path(str(_WORKDIR.value)), config.data.packing
    report, kept = prepare_chats(config, workdir, str(_CHATS.value))
    print(f"{kind}: {'finished before, kept' if kept else 'made'}; {workdir / kind / REPORT}")
    print(describe(report))
    length, chunk = config.data.sequence_length, config.memory.chunk_length
    rows = PackedRows(Corpus.open(workdir / kind / "train"), length, chunk, kind)
    print(
        f"packed: {len(rows)} rows of {length} tokens, {rows.padding:.2%} padding, at most"
        f" {rows.chunks} chunks a row"
    )
    if config.train.epochs:
        steps = with_epochs(config, len(rows)).train.steps
        print(f"{config.train.epochs:g} epochs at {config.data.batch_size} rows: {steps} steps")


if __name__ == "__main__":
    cli.run(main, required=["config", "workdir", "chats"])
