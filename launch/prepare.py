r"""Prepares a workdir: tokenizer, token corpus, references and retrieval index from documents.

    python launch/prepare.py --config=configs/wiki_small.py --workdir=runs/wiki \
        --documents=articles.jsonl.gz

Finished parts are kept, so a stopped run goes on with the same command.

Cleaned first (see the fields `clean.` in m3jax/config.py), by two processes, which make the same
bytes as one; the data report is then in DIR/report/data:

    python launch/prepare.py --config=configs/wiki_small.py --workdir=runs/wiki \
        --documents=articles.jsonl.gz --config.clean.enabled --workers=2

References selected: rules, near-duplicates, and none that holds a question of an evaluation (fields
`knowledge.`); the report is then in DIR/report/knowledge:

    python launch/prepare.py … --config.knowledge.enabled --questions=nq.jsonl,boolq.jsonl

With Apache Beam, on machines that all see the workdir:

    python launch/prepare.py … --beam=--runner=FlinkRunner --beam=--flink_master=HOST:8081
"""

from __future__ import annotations

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from m3jax import cli
from m3jax.config import validate
from m3jax.errors import TextError
from m3jax.text.cleaning.beam import BeamRunner
from m3jax.text.cleaning.workers import LocalRunner, Runner
from m3jax.text.prepare import prepare_text
from m3jax.text.references import References

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, for example configs/….py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; made if it does not exist.")
_DOCUMENTS = flags.DEFINE_string(
    "documents",
    None,
    "Documents to train on: comma-separated .jsonl, .jsonl.gz, .txt or .parquet files, globs,"
    " folders, or tfds:NAME[:SPLIT].",
)
_KNOWLEDGE = flags.DEFINE_string(
    "knowledge", None, "Documents of the knowledge base, as --documents; default: the same."
)
_LIMIT = flags.DEFINE_integer(
    "limit_documents", None, "Use only this many documents of each spec.", lower_bound=1
)


_WORKERS = flags.DEFINE_integer(
    "workers",
    None,
    "Processes that clean and tokenize blocks of documents, and select references. Default: without"
    " --config.clean.enabled and --config.text.shuffle no blocks are made, else this process works"
    " on them.",
    lower_bound=1,
)
_BEAM = flags.DEFINE_multi_string(
    "beam",
    None,
    "Do the work on blocks with Apache Beam; a flag of Beam, as often as needed, for example"
    " --beam=--runner=FlinkRunner. --beam=--runner=FnApiRunner runs in this process.",
)
_QUALITY = flags.DEFINE_string(
    "quality",
    None,
    "Scorer for config.clean.quality_min: a folder made by launch/quality.py, or MODULE:NAME of a"
    " function that makes one.",
)


_QUESTIONS = flags.DEFINE_list(
    "questions",
    [],
    "Files of evaluation questions that no reference may hold, in the forms of launch/evaluate.py"
    " --tasks; with --config.knowledge.enabled.",
)


def main(argv: list[str]) -> None:
    """Prepares the text, then the index over its references."""
    from m3jax.evaluation.lm_eval.files import question_texts
    from m3jax.knowledge.versions import require_unedited
    from m3jax.retrieval.build import build_index
    from m3jax.retrieval.checkpoint_embedders import make_embedder

    config = validate(_CONFIG.value)
    runner = _runner()
    workdir = Path(str(_WORKDIR.value))
    require_unedited(workdir)
    questions = question_texts(_QUESTIONS.value) if _QUESTIONS.value else []
    # First: what is wrong with an encoder or a checkpoint is known at once.
    embedder = make_embedder(config, workdir)
    prepare_text(
        config,
        workdir,
        str(_DOCUMENTS.value),
        _KNOWLEDGE.value,
        _LIMIT.value,
        runner=runner,
        quality=_QUALITY.value,
        questions=questions,
    )

    references = References.open(workdir / "references")
    build_index(references, embedder, workdir / "index", config)
    print(f"index: {len(references)} references in {workdir / 'index'}")


def _runner() -> Runner | None:
    """Who works on blocks, by the flags."""
    if _BEAM.value and _WORKERS.value:
        raise TextError("--workers and --beam exclude each other; Beam has its own flags for it")
    if _BEAM.value:
        return BeamRunner(_BEAM.value)
    return LocalRunner(_WORKERS.value) if _WORKERS.value else None


if __name__ == "__main__":
    cli.run(main, required=["config", "workdir", "documents"])
