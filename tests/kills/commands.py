"""Every command of every launch script: how it is killed, or why it is not."""

import json
import random
import runpy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from processes import ROOT

CONFIG = """
import m3jax.config


def get_config(options=""):
    chosen = m3jax.config.parse_options(options, stage=("warmup", "continual", "sft", "dpo"))
    config = m3jax.config.default()
    config.stage = chosen["stage"]
    config.model.update(layers=2, query_heads=2, kv_heads=1, head_dim=16, hidden=32, mlp_width=64)
    config.model.update(vocabulary=512, prefix="always")
    config.memory.update(layers=1, reference_length=16, kept_tokens=4, chunk_length=16, window=2)
    config.writer.update(batch_references=8, shard_memories=16)
    config.text.update(vocabulary=400, shards=2, validation_share=0.3)
    config.retrieval.update(dimension=64, candidates=8)
    config.data.update(sequence_length=64, batch_size=2, threads=1)
    config.evaluation.update(batch_size=2, batches=1)
    config.optimizer.lr_warmup_steps = 1
    config.train.update(steps=4, checkpoint_every=2, keep_last=1, evaluate_every=4, log_every=1)
    if config.stage != "warmup":
        config.memory.source = "precomputed"
    if config.stage in ("sft", "dpo"):
        m3jax.config.use_alignment_settings(config)
        config.data.batch_size = 2
    return m3jax.config.validate(config)
"""
NAMES = ["Ada", "Bela", "Cleo", "Dov", "Ezra", "Fay", "Gita", "Hugo"]
THINGS = ["bridge", "garden", "market", "mill", "tower", "river"]


@dataclass(frozen=True)
class Killed:
    """A command that is killed: its words after the script's and the command's name.

    Attributes:
      state: what the workdir is when it begins, a name of `STATES`.
      words: `{input}` is the folder of the inputs, `{workdir}` the workdir, `{states}` that of the
        states.
      slow: it takes seconds, as what compiles does, or is like another.
      options: of the config.
      flags: of `config` and `workdir`, those that the command takes.
      also: another state that it reads.
    """

    state: str
    words: str = ""
    slow: bool = False
    options: str = ""
    flags: tuple[str, ...] = ("config", "workdir")
    also: str = ""


# Workdirs as commands find them: the state before, and the commands from there; `rm NAME` deletes.
STATES: dict[str, tuple[str, list[str]]] = {
    "empty": ("", []),
    "text": ("empty", ["prepare.py --documents={input}/documents.jsonl"]),
    "edited": (
        "text",
        ["edit_bank.py add --documents={input}/new.jsonl", "edit_bank.py delete --keys=d1,d2"],
    ),
    "compacted": ("edited", ["edit_bank.py compact"]),
    "damaged": ("edited", ["rm index/manifest.json"]),
    "trained": ("text", ["train.py", "write_bank.py"]),
    "trained_edited": ("trained", ["edit_bank.py add --documents={input}/new.jsonl"]),
    "trained_damaged": ("trained_edited", ["rm bank/memories.zarr/c/0/0/0/0/0/0"]),
    "exported": ("trained", ["convert.py to_hf --folder={workdir}/export"]),
    "continued": ("trained", ["train.py:continual --init_from={workdir}/warmup"]),
    "continued_edited": ("continued", ["edit_bank.py add --documents={input}/new.jsonl"]),
}

_PRINTS = "prints, and writes at most the whole file of --json or --markdown"
_REPORT = "reads, and writes its report as whole files: report.py, `cli.show`"
_CALLS = "calls what the other commands call, one after another, in workdirs of its own"
_NEW, _ADD = "--documents={input}/documents.jsonl", "--documents={input}/new.jsonl"
_CLEAN = (
    "--config.clean.enabled --config.clean.words_min=1 --config.clean.entropy_min=0"
    " --config.clean.similarity=0"
)
COMMANDS: dict[tuple[str, str], list[Killed] | str] = {
    ("prepare", ""): [Killed("empty", _NEW), Killed("empty", f"{_NEW} {_CLEAN}", slow=True)],
    ("prepare", "chats"): [
        Killed("text", "--chats={input}/chats.jsonl", options=":stage=sft"),
        Killed("text", "--chats={input}/pairs.jsonl", True, ":stage=dpo"),
    ],
    ("prepare", "quality"): [
        Killed(
            "empty", "--labelled={input}/labelled.jsonl --scorer={workdir}/scorer", True, flags=()
        )
    ],
    ("edit_bank", "add"): [
        Killed("text", _ADD),
        Killed("edited", "--documents={input}/newer.jsonl", slow=True),
        Killed("trained", _ADD, slow=True),
    ],
    ("edit_bank", "replace"): [Killed("edited", "--documents={input}/changed.jsonl")],
    ("edit_bank", "delete"): [
        Killed("text", "--keys=d1"),
        Killed("edited", "--keys=d3#0,d4", slow=True),
    ],
    ("edit_bank", "merge"): [
        Killed("trained", "--other={states}/trained_edited --replace", True, also="trained_edited")
    ],
    ("edit_bank", "rollback"): [Killed("edited", "--to=0"), Killed("edited", "--to=1", slow=True)],
    ("edit_bank", "compact"): [
        Killed("edited"),
        Killed("compacted"),
        Killed("trained_edited", slow=True),
    ],
    ("edit_bank", "list"): _PRINTS,
    ("edit_bank", "verify"): _PRINTS,
    ("edit_bank", "repair"): [Killed("damaged", slow=True), Killed("trained_damaged", slow=True)],
    ("train", ""): [
        Killed("text", slow=True),
        Killed("trained", "--init_from={workdir}/warmup", True, ":stage=continual"),
    ],
    ("write_bank", ""): [
        Killed("trained", "--bank={workdir}/other", slow=True),
        Killed("continued_edited", "--refresh=all --checkpoint={workdir}/continual", slow=True),
    ],
    ("convert", "to_hf"): [
        Killed("trained", "--folder={workdir}/export", True, flags=("workdir",))
    ],
    ("convert", "from_hf"): [
        Killed("empty", "--model={states}/exported/export", True, also="exported")
    ],
    ("select_memory", "references"): [
        Killed(
            "continued",
            "--budget_bytes=3000 --sample=2 --check=2 --count=0",
            True,
            ":stage=continual",
        )
    ],
    **{("select_memory", name): _REPORT for name in ("heads", "counts", "worth")},
    ("sweep", ""): "is killed in tests/launch/test_sweep_script.py: its steps are processes",
    ("bench", "*"): "measures in a temporary folder",
    ("compile", ""): _PRINTS,
    ("generate", ""): _PRINTS,
    ("plan", ""): _PRINTS,
    **{
        ("evaluate", name): _REPORT
        for name in ("losses", "questions", "tasks", "retrieval", "leakage", "needle")
    },
    **{("quickstart", name): _CALLS for name in ("", "chat", "smollm2")},
}


# Commands that only read, for faults of reading.
READERS: dict[tuple[str, str], list[Killed]] = {
    ("edit_bank", "list"): [Killed("edited")],
    ("edit_bank", "verify"): [Killed("edited"), Killed("trained_edited", slow=True)],
    ("generate", ""): [
        Killed("continued_edited", "--prompt=Ada --new_tokens=2", True, ":stage=continual")
    ],
}


def commands() -> Iterator[tuple[str, str]]:
    """Script and command of every launch script."""
    for path in sorted((ROOT / "launch").glob("*.py")):
        for name in runpy.run_path(str(path), run_name="enumerated")["COMMANDS"]:
            yield path.stem, "*" if path.stem == "bench" else name


def write_inputs(folder: Path) -> None:
    """Writes the config and all documents, chats and pairs that the commands read."""
    draw = random.Random(0)

    def text(sentences: int) -> str:
        said = (
            f"{draw.choice(NAMES)} sees the {draw.choice(THINGS)} number {draw.randrange(100)}."
            for _ in range(sentences)
        )
        return " ".join(said)

    def lines(name: str, make: Callable[[int], dict], count: int, first: int = 0) -> None:
        records = [json.dumps(make(i)) for i in range(first, first + count)]
        (folder / name).write_text("\n".join(records) + "\n")

    folder.mkdir(parents=True)
    (folder / "config.py").write_text(CONFIG)
    document = lambda i: {"id": f"d{i}", "title": f"Title {i}", "text": text(6)}  # noqa: E731
    lines("documents.jsonl", document, 24)
    lines("new.jsonl", document, 2, 100)
    lines("newer.jsonl", document, 1, 200)
    lines("changed.jsonl", document, 1, 5)
    lines("chats.jsonl", lambda i: {"id": f"c{i}", "prompt": text(1), "response": text(1)}, 12)
    pair = lambda i: {"id": f"p{i}", "prompt": text(1), "chosen": "yes", "rejected": "no"}  # noqa: E731
    lines("pairs.jsonl", pair, 12)
    lines("labelled.jsonl", lambda i: {"text": text(3), "score": i % 6}, 20)
