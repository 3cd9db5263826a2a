"""Evaluates a checkpoint: losses with memories and without, tasks, questions, retrieval.

    python launch/evaluate.py losses --config=configs/wiki_small.py:stage=continual \\
        --workdir=runs/wiki
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from absl.flags import FlagValues

from m3jax import cli, places
from m3jax.cli import Flag, count, counts, share, switch, words
from m3jax.errors import TextError

COMMANDS = cli.Commands()
_LOSSES = (*cli.BUCKET_RUN, cli.STAGE_CHECKPOINT, cli.BANK, cli.BANK_VERSION, cli.JSON, cli.CACHE)
# Arguments of `evaluate_questions`, `leakage` and `needle_test`, by their names.
_QUESTIONS = (
    count("k", "References read together; default config.memory.per_prompt_chunk."),
    Flag(
        "overlap",
        "Drop references found whose overlap with the question, or its with them, is above this; 1"
        " drops none. Default config.retrieval.overlap_evaluation, 2/3.",
        float,
        low=0,
        high=1,
    ),
    Flag("new_tokens", "Most tokens of a generated answer; 0 generates none.", int, 32, low=0),
    *(cli.BATCH, cli.SEED),
)
_LEAKAGE = (
    Flag(
        "against",
        "train, validation, or a .jsonl file of questions.",
        places.FILE_OR_SPLIT,
        "train",
    ),
    count("sample", "Most rows or questions, drawn at random.", 1000),
    Flag("threshold", "Overlap above which a reference is dropped.", float, 0.9),
)
_NEEDLE = (
    counts("lengths", "Tokens of the texts.", [512, 1024, 2048, 4096]),
    count("count", "Texts of each length.", 64),
    *(cli.WINDOW, cli.CUT, cli.BATCH, cli.SEED),
)


@COMMANDS.add(*_LOSSES)
def losses(given: FlagValues) -> None:
    r"""Measures the validation loss with memory, without, and with wrong memories.

        python launch/evaluate.py losses --config=configs/wiki_small.py:stage=continual \
            --workdir=runs/wiki

    Memories of a chunk are retrieved with the text before it (config.evaluation.shift = 1), or with
    its own (0).
    """
    from m3jax.evaluation.report import evaluate_losses, losses_table
    from m3jax.inference.session import Session

    report = evaluate_losses(Session(given.config, _workdir(given), **_source(given)))
    cli.show(losses_table(report), report, given.json)


@COMMANDS.add(
    *_LOSSES,
    Flag(
        "questions",
        "Questions to answer: JSON lines, or SQuAD's .json.",
        places.FILE,
        required=True,
    ),
    words(
        "conditions",
        "What the model reads: none, text, text_among, text_found, memory, memory_among,"
        " memory_found, both_found, wrong. Default all that the questions and the config allow.",
        [],
    ),
    Flag("shots", "File of solved examples to put in front of every question.", places.FILE),
    switch("answerable", "Leave out questions none of whose answers stands in a reference."),
    count("sample", "Most questions, drawn at random; default all."),
    switch(
        "cold",
        "Write memories when they are first read; only config.retrieval.rerank needs a bank.",
    ),
    *_QUESTIONS,
)
def questions(given: FlagValues) -> None:
    r"""Measures the answers to questions by what the model reads, with confidence intervals.

        python launch/evaluate.py questions … --questions=xquad.en.json --shots=examples.jsonl
        python launch/evaluate.py questions … --questions=runs/quickstart/text/questions.jsonl \
            --conditions=none,memory_found,wrong --new_tokens=1

    Measures are exact match and F1 of the generated answer (as SQuAD defines them), the share of
    answers that are the model's first choice token by token, and nats a token of the right answer.
    The conditions are nothing; the reference that answers the question, alone or among others, as
    text or as a memory; the texts or memories that the question finds; and memories of others. The
    first needs no knowledge; `text` and `memory` need questions that name their references or
    passages: prepare SQuAD's passages with --knowledge=xquad.en.json.

    JSON lines have `question` and `answer` (a list counts, and `aliases`), or `prompt` and `answer`
    exactly as the model reads and writes them; `references` are the keys of those that answer.

    --json=FILE.json also writes FILE.measures.json: the measures of every question. Run again, the
    same command goes on from the conditions that it holds.
    """
    import numpy as np

    from m3jax.evaluation.answer_recall import answerable_questions
    from m3jax.evaluation.question_table import evaluate_questions, questions_table
    from m3jax.evaluation.questions import read_questions
    from m3jax.inference.session import Session

    every = read_questions(given.questions)  # first: what is wrong with a file is known at once
    shots = read_questions(given.shots) if given.shots else []
    session = Session(given.config, _workdir(given), **_source(given))
    if given.answerable:
        answered = answerable_questions(session.references, [question.right for question in every])
        print(f"{answered.sum()} of {len(every)} questions have an answer in a reference")
        every = [question for question, kept in zip(every, answered, strict=True) if kept]
        if not every:
            raise TextError(f"--answerable leaves no question of {given.questions}")
    drawn = np.random.default_rng(given.seed).permutation(len(every))[: given.sample]
    sample = [every[number] for number in np.sort(drawn)]
    options = cli.values_of(given, _QUESTIONS)
    options["batch_size"] = options.pop("batch")
    options["cold"] = given.cold
    if given.json and Path(given.json).suffix == ".json":  # no device
        options["kept"] = Path(given.json).with_suffix(".measures.json")
    report = evaluate_questions(session, sample, given.conditions, shots=shots, **options)
    cli.show(questions_table(report), report, given.json)


def _workdir(given: FlagValues) -> Path:
    """Returns the workdir, or the mirror of one in a bucket."""
    from m3jax.mirror import Mirror

    return Mirror(given.workdir, given.cache_dir).local


def _source(given: FlagValues) -> dict[str, Any]:
    return {"checkpoint": given.checkpoint, "bank": given.bank, "version": given.bank_version}


@COMMANDS.add(
    *_LOSSES,
    Flag(
        "tasks",
        "Task files, or folders of them, to score.",
        places.FILE_OR_FOLDER,
        many="comma",
        required=True,
    ),
    words(
        "modes",
        "What the model reads: nothing, memories (also called explicit), references as text in the"
        " prompt, memories of another question.",
        ["none", "memory", "rag", "wrong"],
    ),
    Flag(
        "compressed_bank", "Bank of compressed memories; adds the mode `compressed`.", places.BANK
    ),
    dataclasses.replace(
        cli.CONFIG,
        name="warmup_config",
        help="Config of warmup: its checkpoint, in WORKDIR/warmup, makes a first column.",
        required=False,
    ),
    Flag("shots", "Examples in front of every question.", int, 0, low=0),
    count("limit", "Most examples of a task, from its first; default all."),
    Flag(
        "overlap",
        "Drop references whose overlap with the question is above this; 1 drops none. Several make"
        " a column each. Default config.retrieval.overlap_evaluation, 2/3.",
        float,
        [],
        many="comma",
    ),
    cli.RAG_REFERENCES,
    cli.BATCH,
)
def tasks(given: FlagValues) -> None:
    """Scores tasks in every mode with lm-evaluation-harness (pip install 'm3jax[eval]').

        python launch/evaluate.py tasks … --tasks=arc_easy.jsonl,nq_open_dev.jsonl --limit=100
        python launch/evaluate.py tasks … --tasks=arc_easy.jsonl --modes=none,memory \\
            --overlap=1,0.8,0.6667
        python launch/evaluate.py tasks … --tasks=arc_easy.jsonl \\
            --warmup_config=configs/wiki_small.py

    m3jax/evaluation/task_files.py lists what a file may hold: multiple choice, MMLU (.csv),
    schemas, continuations, open questions (JSON lines, or SQuAD's .json), questions with a number
    as the answer, and questions.jsonl of a quickstart.
    """
    from m3jax.evaluation.lm_eval.run import columns, evaluate_tasks, tasks_table
    from m3jax.evaluation.task_files import read_task, task_files
    from m3jax.inference.session import Session
    from m3jax.text.listing import describe_files

    modes = list(given.modes)
    if given.compressed_bank and "compressed" not in modes:
        modes.insert(modes.index("memory") + 1 if "memory" in modes else len(modes), "compressed")
    left_out: dict[str, list[str]] = {}
    read = [read_task(path) for path in task_files(given.tasks, left_out)]
    if left_out:
        print(f"not read: {describe_files(left_out)}")
    warmup = None
    if given.warmup_config is not None:
        modes.insert(0, "warmup")
        warmup = Session(given.warmup_config, _workdir(given))
    chosen = columns(modes, given.overlap)
    session = Session(given.config, _workdir(given), **_source(given))
    report = evaluate_tasks(
        *(session, read, chosen),
        shots=given.shots,
        limit=given.limit,
        references=given.references,
        batch_size=given.batch,
        compressed=given.compressed_bank,
        warmup=warmup,
    )
    about = {"checkpoint": str(session.checkpoint), "step": session.meta["step"]}
    cli.show(tasks_table(report), {**about, **report}, given.json)


@COMMANDS.add(
    *cli.BUCKET_RUN,
    counts("k", "References per query; exact search takes the largest.", [1, 5]),
    Flag(
        "queries",
        "JSON lines with `question` or `text`; default halves of references.",
        places.FILE,
    ),
    count("sample", "Most queries to compare.", 200),
    share("least_recall", "Least recall; exit code 1 below.", 0.0),
    Flag("questions", "Questions with answers (JSON lines).", places.FILE),
    cli.BANK_VERSION.with_help("With --questions."),
    cli.JSON,
)
def retrieval(given: FlagValues) -> None:
    """Compares the index with exact search, or counts retrieved answers to questions.

        python launch/evaluate.py retrieval --config=configs/wiki_small.py --workdir=runs/wiki
        python launch/evaluate.py retrieval … --queries=queries.jsonl --least_recall=0.95
        python launch/evaluate.py retrieval … --questions=questions.jsonl --k=1,5

    Queries of the comparison are second halves of sampled references, or the texts of a file. The
    exit code is 1 if the recall at the largest k is below --least_recall.

    With --questions, instead, it counts for how many of them a reference that holds the answer is
    among the k best: of those that the knowledge base can answer, with an answer in any reference
    as a run of whole words. Questions are JSON lines with `question` (or `context`, `prompt`) and
    `answer` (a string or a list; `aliases` count, too), or a file .json in the format of SQuAD.
    """
    from m3jax.errors import CommandError

    if given.questions and (given.queries or given.least_recall):
        raise CommandError("--questions compares with no exact search; leave out the other flags")
    (_answer_recall if given.questions else _index_recall)(given)


def _answer_recall(given: FlagValues) -> None:
    from m3jax.evaluation.answer_recall import hit_rates, hit_rates_table

    at, version = sorted(given.k), given.bank_version
    report = hit_rates(given.config, _workdir(given), given.questions, at=at, version=version)
    cli.show(hit_rates_table(report), report, given.json)


def _index_recall(given: FlagValues) -> None:
    from m3jax.mirror import Mirror
    from m3jax.retrieval.index import Index
    from m3jax.retrieval.tune import read_queries, recall_report, recall_table, sample_queries
    from m3jax.text.references import References

    texts = None if given.queries is None else read_queries(given.queries, given.sample)
    mirror = Mirror(given.workdir, given.cache_dir)
    mirror.fetch("references", "index")
    references = References(mirror.local / "references")
    index = Index.open(mirror.local / "index", references)
    if texts is None:
        queries = sample_queries(references, index.embedder, given.sample)
    else:
        queries = index.embedder.embed_queries(texts)
    report = recall_report(index, queries, max(given.k))
    cli.show(recall_table(report), report, given.json)
    if report["recall"] < given.least_recall:
        raise SystemExit(
            f"recall {report['recall']:.3f} is below --least_recall={given.least_recall}"
        )


@COMMANDS.add(
    *cli.BUCKET_RUN,
    *_LEAKAGE,
    cli.PICTURE.with_help("Default WORKDIR/report/leakage.png."),
    cli.JSON,
)
def leakage(given: FlagValues) -> None:
    """Measures how much of what retrieval returns is in the text already, before any filter.

        python launch/evaluate.py leakage --config=configs/wiki_small.py --workdir=runs/wiki
        python launch/evaluate.py leakage … --against=validation --threshold=0.667
        python launch/evaluate.py leakage … --against=questions.jsonl

    Prints quantiles of the overlap (Memory³ §6.1), shares above the thresholds and the worst pairs
    side by side, and draws a histogram. Questions are JSON lines with `prompt` or `question`.
    """
    from m3jax.evaluation.leakage import leakage, leakage_histogram, leakage_table
    from m3jax.mirror import Mirror

    mirror = Mirror(given.workdir, given.cache_dir)
    report = leakage(given.config, mirror.local, **cli.values_of(given, _LEAKAGE))
    path = given.picture or mirror.local / "report" / "leakage.png"
    cli.show(leakage_table(report), report, given.json)
    leakage_histogram(report, path)
    print(f"\npicture: {mirror.keep(path)}")


@COMMANDS.add(
    *(*cli.BUCKET_RUN, cli.STAGE_CHECKPOINT, cli.CACHE, *_NEEDLE, cli.PICTURE, cli.JSON),
    Flag("needles", "File of needles, .jsonl.", places.FILE, required=True),
    Flag(
        "haystack",
        "Folder of references to hide them among; default the workdir's.",
        places.FOLDER,
    ),
)
def needle(given: FlagValues) -> None:
    r"""Tests the recall of a fact from a text longer than the model's context.

        python launch/evaluate.py needle --config=configs/quickstart.py:stage=continual \
            --workdir=runs/quickstart --needles=runs/quickstart/text/needles.jsonl \
            --lengths=60,120,240,480,960,1920 --window=20 --cut=10 --picture=needle.png

    Needles are JSON lines with `needle`, `prompt` and `answer`. Each is hidden among references of
    the knowledge base (or of --haystack), the prompt follows at the end, and the model generates.
    Of a text longer than its context it reads the last --window tokens; older text is cut into
    memories of at most --cut tokens, which it retrieves, or it is forgotten.
    """
    from m3jax.evaluation.needle import needle_table, needle_test, read_needles
    from m3jax.evaluation.plots import needle_lines
    from m3jax.inference.session import Session
    from m3jax.text.references import References

    needles = read_needles(given.needles)
    session = Session(given.config, _workdir(given), checkpoint=given.checkpoint)
    haystack = References(given.haystack) if given.haystack else session.references
    report = needle_test(session, needles, haystack, **cli.values_of(given, _NEEDLE))
    cli.show(needle_table(report), report, given.json)
    if given.picture:
        needle_lines(given.picture, report)


if __name__ == "__main__":
    cli.run(__doc__, COMMANDS)
