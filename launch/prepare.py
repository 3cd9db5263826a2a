r"""Prepares a workdir: tokenizer, token corpus, references and retrieval index from documents.

    python launch/prepare.py --config=configs/wiki_small.py --workdir=runs/wiki \
        --documents=articles.jsonl.gz

Finished parts are kept, so a stopped run goes on with the same command.

Cleaned first (config section `clean`), by two processes, which make the same bytes as one; the data
report is then in DIR/report/data:

    python launch/prepare.py … --config.clean.enabled --workers=2

References selected: rules, near-duplicates, and none that holds a question of an evaluation (config
section `knowledge`); the report is then in DIR/report/knowledge:

    python launch/prepare.py … --config.knowledge.enabled --questions=nq.jsonl,boolq.jsonl

Into a bucket: parts are made in a local copy in --cache_dir and published when they are finished;
another machine goes on from what was published:

    python launch/prepare.py … --workdir=gs://my-bucket/runs/wiki

With Apache Beam, on machines that all see the workdir:

    python launch/prepare.py … --beam=--runner=FlinkRunner --beam=--flink_master=HOST:8081
"""

from __future__ import annotations

from typing import Any

from absl.flags import FlagValues

from m3jax import cli, places
from m3jax.cli import Flag, count
from m3jax.errors import CommandError

COMMANDS = cli.Commands()
PARTS = ("clean", "tokenizer", "corpus/validation", "corpus/train", "references", "index")
REPORTS = {"clean": "report/data", "references": "report/knowledge"}  # of parts


@COMMANDS.add(
    *(cli.CONFIG, cli.NEW_BUCKET_WORKDIR, cli.CACHE_DIR),
    Flag(
        "documents",
        "Documents to train on: comma-separated .jsonl, .json, .parquet, .txt or .md files (plain,"
        " .gz or .zst), globs, folders, or tfds:NAME[:SPLIT].",
        places.TEXTS,
        required=True,
    ),
    Flag(
        "knowledge",
        "Documents of the knowledge base, as --documents; default: the same.",
        places.TEXTS,
    ),
    count("limit_documents", "Use only this many documents of each spec."),
    count(
        "workers",
        "Processes that clean and tokenize blocks of documents, and select references. Default:"
        " without --config.clean.enabled and --config.text.shuffle no blocks are made, else this"
        " process works on them.",
    ),
    Flag(
        "beam",
        "Do the work on blocks with Apache Beam; a flag of Beam, for example"
        " --beam=--runner=FlinkRunner. --beam=--runner=FnApiRunner runs in this process.",
        many="repeat",
    ),
    Flag(
        "quality",
        "Scorer for config.clean.quality_min: a folder made by `prepare.py quality`, or"
        " MODULE:NAME of a function that makes one.",
        places.FOLDER_OR_FUNCTION,
    ),
    Flag(
        "questions",
        "Files of evaluation questions that no reference may hold, in the forms of"
        " launch/evaluate.py tasks; with --config.knowledge.enabled.",
        places.FILE_OR_FOLDER,
        default=[],
        many="comma",
    ),
)
def main(given: FlagValues) -> None:
    """Prepares the text, then the index over its references."""
    from m3jax.evaluation.task_files import question_texts
    from m3jax.knowledge.versions import require_unedited
    from m3jax.mirror import Mirror
    from m3jax.retrieval.build import build_index
    from m3jax.retrieval.embed import make_embedder
    from m3jax.text.listing import describe_files
    from m3jax.text.prepare import prepare_text
    from m3jax.text.references import References

    config, mirror = given.config, Mirror(given.workdir, given.cache_dir)
    workdir, runner = mirror.local, _runner(given, mirror.in_bucket)
    require_unedited(workdir)
    left_out: dict[str, list[str]] = {}
    questions = question_texts(given.questions, left_out) if given.questions else []
    if left_out:
        print(f"files of questions not read: {describe_files(left_out)}")

    def finish(part: str) -> None:
        if not mirror.has(part):
            if (workdir / REPORTS.get(part, "no report")).exists():
                mirror.publish(REPORTS[part])
            mirror.publish(part)

    embedder = make_embedder(config)  # first: what is wrong with an encoder is known at once
    with mirror.only_writer():
        mirror.fetch(*mirror.published(*PARTS, *REPORTS.values()))
        prepare_text(
            *(config, workdir, given.documents, given.knowledge, given.limit_documents),
            runner=runner,
            quality=given.quality,
            questions=questions,
            finish=finish,
        )
        references = References(workdir / "references")
        build_index(references, embedder, workdir / "index", config)
        mirror.publish("index")
    print(f"index: {len(references)} references in {mirror.url('index')}")


def _runner(given: FlagValues, in_bucket: bool) -> Any:
    from m3jax.text.cleaning.workers import BeamRunner, LocalRunner

    if given.beam and in_bucket:
        raise CommandError(
            "--beam needs a workdir that all of its machines see as a folder; give a local"
            " --workdir, or --workers in place of --beam"
        )
    if given.beam and given.workers:
        raise CommandError("--workers and --beam exclude each other; Beam has its own flags for it")
    if given.beam:
        return BeamRunner(given.beam)
    return LocalRunner(given.workers) if given.workers else None


@COMMANDS.add(
    *cli.BUCKET_RUN,
    Flag(
        "chats",
        "Chats or pairs: .jsonl, .json or .parquet files, globs, folders.",
        places.TEXTS,
        required=True,
    ),
)
def chats(given: FlagValues) -> None:
    r"""Prepares chats for SFT, or preference pairs for DPO, in a workdir that has a tokenizer.

        python launch/prepare.py chats --config=configs/wiki_small.py:stage=sft \
            --workdir=runs/wiki --chats=chats.jsonl
        python launch/prepare.py chats --config=configs/wiki_small.py:stage=dpo \
            --workdir=runs/wiki --chats=pairs.jsonl

    Lines are chats (messages, ShareGPT conversations, prompt and response) or pairs (prompt,
    chosen, rejected); m3jax/text/chat/chats.py lists the forms. Unusable lines are left out and
    reported, or, where they are more than config.chat.bad_share, refused with file and line. A
    finished part is kept.
    """
    import contextlib

    from m3jax.config import with_epochs
    from m3jax.data.rows import PackedRows
    from m3jax.mirror import Mirror
    from m3jax.text.chat.corpus import REPORT, describe, prepare_chats
    from m3jax.text.corpus import Corpus

    config, kind = given.config, given.config.data.packing
    mirror = Mirror(given.workdir, given.cache_dir)
    workdir = mirror.local
    with mirror.only_writer() if mirror.in_bucket else contextlib.nullcontext():
        mirror.fetch("tokenizer", *mirror.published(kind))
        report, kept = prepare_chats(config, workdir, given.chats)
        mirror.publish(kind)
    print(f"{kind}: {'finished before, kept' if kept else 'made'}; {workdir / kind / REPORT}")
    print(describe(report))
    length, chunk = config.data.sequence_length, config.memory.chunk_length
    rows = PackedRows(Corpus(workdir / kind / "train"), length, chunk, kind)
    print(
        f"packed: {len(rows)} rows of {length} tokens, {rows.padding:.2%} padding, at most"
        f" {rows.chunks} chunks a row"
    )
    if config.train.epochs:
        steps = with_epochs(config, len(rows)).train.steps
        print(f"{config.train.epochs:g} epochs at {config.data.batch_size} rows: {steps} steps")


@COMMANDS.add(
    Flag("labelled", "JSON lines of texts with their scores, 0 … 5.", places.FILE, required=True),
    Flag("scorer", "Folder to write the scorer to.", places.NEW_FOLDER, required=True),
    Flag("penalty", "Ridge penalty; more for fewer or noisier labels.", float, 0.1, low=0),
)
def quality(given: FlagValues) -> None:
    r"""Trains a quality scorer from labelled texts, for `config.clean.quality_min`.

        python launch/prepare.py quality --labelled=labelled.jsonl --scorer=runs/quality
        python launch/prepare.py … --quality=runs/quality \
            --config.clean.enabled --config.clean.quality_min=2

    A line of the labelled texts is `{"text": "…", "score": 3}`, with scores from 0 to 5. A fifth of
    them is held out and scored first, to see what the scorer is worth; then it learns from all.
    """
    from m3jax.text.cleaning.quality import train_scorer

    print(train_scorer(given.labelled, given.scorer, given.penalty))


if __name__ == "__main__":
    cli.run(__doc__, COMMANDS)
