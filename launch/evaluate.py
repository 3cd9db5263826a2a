"""Evaluates a checkpoint: loss with memory, without and with wrong memories; questions; tasks.

    python launch/evaluate.py --config=configs/wiki_small.py:stage=continual --workdir=runs/wiki
    python launch/evaluate.py … --questions=questions.jsonl
    python launch/evaluate.py … --tasks=arc_easy.jsonl,nq_open_dev.jsonl --limit=100
    python launch/evaluate.py … --tasks=arc_easy.jsonl --modes=none,memory --overlap=1,0.8,0.6667
    python launch/evaluate.py … --tasks=arc_easy.jsonl --warmup_config=configs/….py:stage=warmup

Losses are those of `corpus/validation` at `evaluation.shift` 1 unless --shift says otherwise: a
chunk's memories are found with the text before it. Questions are JSON lines with `prompt` and
`answer`.

Tasks, instead, are scored by lm-evaluation-harness (`pip install 'm3jax[eval]'`) in every mode, as
one table. What a file may hold is said in m3jax/evaluation/lm_eval/files.py: multiple choice, MMLU
(.csv), schemas, continuations, open questions (JSON lines, or SQuAD's .json), questions with a
number as the answer, and questions.jsonl of a quickstart.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from m3jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, for example configs/….py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, made by launch/prepare.py.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Stage folder, or checkpoints/STEP in it; default WORKDIR/<config.stage>."
)
_BANK = flags.DEFINE_string(
    "bank", None, "Folder or URL of a bank of explicit memories; default WORKDIR/bank."
)
_VERSION = flags.DEFINE_integer(
    "bank_version",
    None,
    "Version of the knowledge, of launch/edit_bank.py list; default current.",
)
_SHIFT = flags.DEFINE_enum(
    "shift",
    None,
    ["0", "1"],
    "Whose text retrieves a chunk's memories: 0 its own, 1 the previous chunk's; default from the"
    " config, 1.",
)
_QUESTIONS = flags.DEFINE_string("questions", None, "Also answer these questions (JSON lines).")
_TASKS = flags.DEFINE_list("tasks", None, "Task files, or folders of them, to score.")
_MODES = flags.DEFINE_list(
    "modes",
    ["none", "memory", "rag", "wrong"],
    "What the model reads in tasks: nothing, memories (also called explicit), references as text in"
    " the prompt, memories of another question.",
)
_COMPRESSED = flags.DEFINE_string(
    "compressed_bank", None, "Bank of compressed memories; adds the mode `compressed` to tasks."
)
_WARMUP = config_flags.DEFINE_config_file(
    "warmup_config",
    None,
    "Config of the stage before: its checkpoint, in WORKDIR/warmup, makes a first column of tasks.",
)
_SHOTS = flags.DEFINE_integer(
    "shots", 0, "Examples in front of every question of a task.", lower_bound=0
)
_LIMIT = flags.DEFINE_integer(
    "limit", None, "Most examples of a task, from its first; default all.", lower_bound=1
)
_OVERLAP = flags.DEFINE_list(
    "overlap",
    [],
    "In tasks drop references whose overlap with the question is above this; 1 drops none. Several"
    " make a column each. Default config.retrieval.overlap_evaluation, 2/3.",
)
_REFERENCES = flags.DEFINE_integer(
    "references", 5, "References in the prompt, in the mode rag.", lower_bound=1
)
_BATCH = flags.DEFINE_integer(
    "batch", 16, "Rows of tasks that the device works on at once.", lower_bound=1
)
_JSON = flags.DEFINE_string("json", None, "Write the figures to this file.")
cli.define_cache_flag()
flags.adopt_module_key_flags(cli)  # --help shows them


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


flags.register_validator(
    "overlap",
    lambda limits: all(_is_number(limit) for limit in limits),
    "a list of numbers above 0 and at most 1, for example 1,0.8,0.6667",
)


def main(argv: list[str]) -> None:
    """Prints a table and writes JSON."""
    cli.use_compilation_cache()
    from m3jax.config import validate
    from m3jax.files import write_atomically

    config = _CONFIG.value
    if _SHIFT.value is not None:
        with config.unlocked():
            config.evaluation.shift = int(_SHIFT.value)
    config, workdir = validate(config), Path(str(_WORKDIR.value))
    report, text = (_losses if _TASKS.value is None else _scores)(config, workdir)
    print(text)
    if _JSON.value:
        write_atomically(Path(_JSON.value), (json.dumps(report, indent=2) + "\n").encode())


def _losses(config: Any, workdir: Path) -> tuple[dict[str, Any], str]:
    """Report and table of the validation text, and of the questions."""
    from m3jax.evaluation.report import evaluate, table

    report = evaluate(
        config,
        workdir,
        checkpoint=_CHECKPOINT.value,
        bank=_BANK.value,
        questions=_QUESTIONS.value,
        version=_VERSION.value,
    )
    return report, table(report)


def _scores(config: Any, workdir: Path) -> tuple[dict[str, Any], str]:
    """Report and table of the tasks."""
    from m3jax.config import validate
    from m3jax.evaluation.lm_eval.files import read_task, task_files
    from m3jax.evaluation.lm_eval.run import columns, evaluate_tasks, table
    from m3jax.inference.session import Session

    modes = list(_MODES.value or [])
    if _COMPRESSED.value and "compressed" not in modes:
        place = modes.index("memory") + 1 if "memory" in modes else len(modes)
        modes.insert(place, "compressed")
    warmup = None
    if _WARMUP.value is not None:
        modes.insert(0, "warmup")
        warmup = Session(validate(_WARMUP.value), workdir)
    wanted = columns(modes, [float(limit) for limit in _OVERLAP.value or []])
    tasks = [read_task(path) for path in task_files(_TASKS.value or [])]
    session = Session(
        config, workdir, checkpoint=_CHECKPOINT.value, bank=_BANK.value, version=_VERSION.value
    )
    report = evaluate_tasks(
        session,
        tasks,
        wanted,
        shots=_SHOTS.value,
        limit=_LIMIT.value,
        references=_REFERENCES.value,
        batch_size=_BATCH.value,
        compressed=_COMPRESSED.value,
        warmup=warmup,
    )
    found = {"checkpoint": str(session.checkpoint), "step": session.meta["step"], **report}
    return found, table(report)


if __name__ == "__main__":
    cli.run(main, required=["config", "workdir"])
