"""Selects what deserves a memory: references, by expected drop of loss a byte, or heads.

    python launch/select_memory.py references --config=configs/wiki_small.py:stage=continual \\
        --workdir=runs/wiki --budget_bytes=100000000 --dry_run
"""

from __future__ import annotations

import numpy as np
from absl.flags import FlagValues

from m3jax import cli, places
from m3jax.cli import Flag, count, share, switch

COMMANDS = cli.Commands()
# Arguments of `select_references`, by their names.
_OPTIONS = (
    count("sample", "Validation rows in which drops are measured.", 256),
    Flag(
        "count",
        "Most training rows to count references in; 0 = only the measured validation rows.",
        int,
        4096,
        low=0,
    ),
    count("check", "Validation rows on which the selection is validated.", 256),
    Flag("draws", "Random selections that it is compared with.", int, 3, low=0),
)
_MODEL = (*cli.BUCKET_RUN, cli.STAGE_CHECKPOINT, cli.CACHE)


@COMMANDS.add(
    *_MODEL,
    Flag("budget_bytes", "Bytes of the selected references' memories.", int, required=True),
    *(cli.BANK_VERSION, *_OPTIONS, cli.JSON),
    switch("dry_run", "Make no version: report and list only."),
)
def references(given: FlagValues) -> None:
    r"""Selects the references that are worth a memory: the expected drop of validation loss.

        python launch/select_memory.py references --config=configs/wiki_small.py:stage=continual \
            --workdir=runs/wiki --budget_bytes=100000000 --dry_run

    For a sample of validation rows, the loss with and without the memory of each reference that
    they retrieve is measured with a checkpoint that reads memories; how often each is retrieved is
    counted on training rows, too. References with the most expected drop a byte are selected within
    the budget, and the selection is validated on rows of other documents, against all references
    and as many at random. Without --dry_run a version of the knowledge holds the selected ones
    alone: rollback of launch/edit_bank.py goes back, compact frees the bytes of the others. Report,
    picture and list are in WORKDIR/report/usefulness. A stopped measurement goes on with the same
    command.
    """
    from m3jax.mirror import Mirror
    from m3jax.selection.report import choice_table
    from m3jax.selection.select import FOLDER, select_references

    mirror = Mirror(given.workdir, given.cache_dir)
    report = select_references(
        *(given.config, mirror.local, given.budget_bytes),
        checkpoint=given.checkpoint,
        version=given.bank_version,
        **cli.values_of(given, _OPTIONS),
        dry_run=given.dry_run,
    )
    mirror.publish(f"report/{FOLDER}")
    cli.show(choice_table(report), report, given.json)
    if "new_version" in report:
        print(f"version {report['new_version']} of the knowledge is current")


@COMMANDS.add(
    *_MODEL,
    Flag(
        "hide",
        "What a masked head does not see: older tokens of the context, or the memories.",
        default="context",
        choices=("context", "memory"),
    ),
    count("window", "Tokens that it still sees, with --hide=context.", 100),
    Flag(
        "by",
        "Heads to rank: key-value heads with all of their query heads, which is what a bank"
        " stores, or single query heads.",
        default="kv",
        choices=("kv", "query"),
    ),
    share("keep", "Share of the heads in the memory layers to select, with --by=kv.", 0.5),
    cli.JSON.with_help("Default WORKDIR/report/heads-HIDE-BY.json."),
    cli.PICTURE.with_help("Default WORKDIR/report/heads-HIDE-BY.png."),
)
def heads(given: FlagValues) -> None:
    r"""Ranks heads by how much the loss rises when one of them sees less, and selects memory heads.

        python launch/select_memory.py heads --config=configs/wiki_small.py --workdir=runs/wiki
        python launch/select_memory.py heads --config=configs/wiki_small.py:stage=continual \
            --workdir=runs/wiki --hide=memory --keep=0.5

    A masked head sees only the last --window tokens and the beginning (Memory³ §7), or, with
    --hide=memory and a model that reads memories, all but these. The loss is that of the validation
    text (`evaluation.batches`). Prints the ranking and the value of config.memory.heads that keeps
    the best --keep of the heads in the memory layers; a bank written with it holds their memories
    alone:

        python launch/write_bank.py … --config.memory.heads=0:1,2:0+1

    Draws the heat map and writes all figures as JSON. A stopped run goes on with the same command.
    """
    from m3jax.evaluation.plots import head_map
    from m3jax.mirror import Mirror
    from m3jax.selection.heads import heads_report, heads_table, score_heads

    config, by_query = given.config, given.by == "query"
    mirror = Mirror(given.workdir, given.cache_dir)
    at = config, mirror.local, given.checkpoint
    scores = score_heads(*at, hide=given.hide, window=given.window, by_query=by_query)
    first = config.memory.first_layer
    layers = range(first, first + config.memory.layers)
    chosen = [] if by_query else scores.best(given.keep, layers)
    figures = heads_report(scores, chosen)
    path = mirror.local / "report" / f"heads-{given.hide}-{given.by}"
    json = given.json or path.with_suffix(".json")
    picture = given.picture or path.with_suffix(".png")
    cli.show(heads_table(figures), figures, json)
    if chosen:
        number = f"{len(chosen)} of {config.memory.layers * config.model.kv_heads}"
        print(f"\nthe best {number}: --config.memory.heads={figures['memory_heads']}")
    hidden = "memories" if given.hide == "memory" else f"all but the last {given.window} tokens"
    title = f"One {'query' if by_query else 'key-value'} head at a time without {hidden}"
    picture.parent.mkdir(parents=True, exist_ok=True)
    head_map(picture, scores.increase, title, chosen=chosen, layers=layers)
    print(f"figures: {mirror.keep(json)}\npicture: {mirror.keep(picture)}")


@COMMANDS.add(
    *_MODEL,
    Flag("budget", "Tokens of a memory for each memory layer and key-value head.", float, 16.0),
    Flag("each", "Tokens of these that every head keeps.", int, 4, low=0),
    count("references", "References of the workdir to look at.", 64),
    cli.JSON.with_help("Default WORKDIR/report/counts.json."),
    cli.PICTURE.with_help("Default WORKDIR/report/counts.png."),
)
def counts(given: FlagValues) -> None:
    r"""Deals the tokens of a memory to the layers and heads in which they matter (memory heads).

        python launch/select_memory.py counts --config=configs/wiki_small.py --workdir=runs/wiki

    A token matters in a head as much as a second copy of its reference looks at it there. Every
    head keeps --each tokens, the rest of the budget goes where it matters most, over all memory
    layers together. Prints `config.memory.counts`, a config string for every command that writes
    or reads memories, which also needs

        --config.memory.selection=reconstruction --config.memory.each=EACH

    (config files take it from the JSON file). Draws the map of layers and heads.
    """
    from m3jax.evaluation.plots import count_map
    from m3jax.mirror import Mirror
    from m3jax.selection.counts import counts_table, select_counts

    mirror = Mirror(given.workdir, given.cache_dir)
    report = select_counts(
        *(given.config, mirror.local, given.checkpoint),
        budget=given.budget,
        each=given.each,
        sample=given.references,
    )
    path = mirror.local / "report" / "counts"
    json = given.json or path.with_suffix(".json")
    picture = given.picture or path.with_suffix(".png")
    cli.show(counts_table(report), report, json)
    picture.parent.mkdir(parents=True, exist_ok=True)
    title = f"Tokens that a memory of {given.budget:g} a head keeps"
    count_map(picture, np.array(report["by_layer"]), title, report["first_layer"])
    print(f"\n--config.memory.counts={report['counts']}")
    print(f"figures: {mirror.keep(json)}\npicture: {mirror.keep(picture)}")


@COMMANDS.add(
    *_MODEL,
    Flag(
        "documents",
        "Texts to go on from, and to deal the counts by.",
        places.TEXTS,
        required=True,
    ),
    Flag("questions", "Paragraphs with questions, in SQuAD's format.", places.FILE),
    cli.counts("budgets", "Tokens of a memory for each memory layer and key-value head.", [16]),
    cli.words(
        "rules",
        "Rows of the table: a budget on memory heads, evenly, evenly by the paper's rule; all"
        " tokens.",
        ["heads", "uniform", "paper", "all"],
    ),
    count("texts", "Texts and questions of a task.", 96),
    Flag("skip", "Long documents to leave out, and the seed of the questions.", int, 0, low=0),
    cli.JSON.with_help("Default WORKDIR/report/worth.json."),
)
def worth(given: FlagValues) -> None:
    r"""Measures what memories are worth, against the same text in the prompt, by way of selecting.

        python launch/select_memory.py worth --config=configs/wiki_small.py --workdir=runs/wiki \
            --documents=articles.jsonl.gz --questions=xquad.en.json --budgets=2,4,8,16,32

    Two tasks: answers to questions, whose paragraph is the reference, and the continuation of a
    text. The reader has nothing, the reference as text, its memory, this and four others, a wrong
    one or five wrong ones. Budgets are spent on memory heads (a quarter in every head, the rest
    where it matters), or evenly, by two rules; `all` keeps every token. Prints nats a token with
    standard errors, and the share of what the text is worth.
    """
    from m3jax.mirror import Mirror
    from m3jax.selection.worth import worth_report, worth_table

    mirror = Mirror(given.workdir, given.cache_dir)
    report = worth_report(
        *(given.config, mirror.local, given.checkpoint),
        documents=given.documents,
        questions=given.questions,
        budgets=given.budgets,
        rules=given.rules,
        most=given.texts,
        skip=given.skip,
    )
    json = given.json or mirror.local / "report" / "worth.json"
    cli.show(worth_table(report), report, json)
    print(f"figures: {mirror.keep(json)}")


if __name__ == "__main__":
    cli.run(__doc__, COMMANDS)
