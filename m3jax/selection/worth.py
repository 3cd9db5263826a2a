"""Measures what a memory is worth: nats of a text that it helps to predict, against the text
itself.

Two tasks: answers to questions about a paragraph (SQuAD format), and the continuation of a text.
The reader has nothing, the reference as text in front, its memory, the memory among four others, or
wrong memories. The worth of a condition is its share of what the text is worth: (none − condition)
/ (none − text).
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict
from tqdm import tqdm

from m3jax.checkpoint import restore_params
from m3jax.checkpoint_folder import named_checkpoint
from m3jax.config import PREFIX_TOKENS, format_counts, memory_layers
from m3jax.errors import ConfigError, TextError
from m3jax.knowledge.memory_writer import restore_writer
from m3jax.make_model import make_model
from m3jax.memory.sparsify import RECONSTRUCTION, sparsifier
from m3jax.mirror import Mirror
from m3jax.model.attention_mask import ExplicitMemory
from m3jax.model.parameters import Params
from m3jax.selection.counts import TokenWeights, check_budget, deal_counts, measure_weights
from m3jax.text.documents import check_documents, read_documents
from m3jax.text.squad import Passage, read_squad
from m3jax.text.tokenizer import Tokenizer

Encode = Callable[[str], list[int]]
Decode = Callable[[list[int]], str]

SHOTS = (
    "Question: What is the capital of France?\nAnswer: Paris\n\nQuestion: In what year did the"
    " First World War begin?\nAnswer: 1914\n\nQuestion: Who wrote the play Hamlet?\nAnswer: William"
    " Shakespeare\n\nQuestion: "
)
RULES = ("heads", "uniform", "paper", "all")
OTHERS = {  # of each condition, how far behind its own reference those read stand in the list
    "five": (0, 3, 8, 13, 18),
    "five, own farthest": (3, 8, 13, 18, 0),
    "wrong": (7,),
    "five wrong": (2, 5, 10, 15, 20),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """Texts to predict, each with its reference.

    Attributes:
      name: what the texts are.
      references: the references that occur, all of W tokens.
      own: index into `references` of each text's reference.
      context: tokens in front of each text that are not predicted.
      target: tokens that are predicted.
      separator: tokens between a reference as text and the context.
    """

    name: str
    references: Int[np.ndarray, "U W"]
    own: Int[np.ndarray, " n"]
    context: list[list[int]]
    target: list[list[int]]
    separator: list[int]

    def __len__(self) -> int:
        return len(self.own)

    def part(self, rows: Sequence[int]) -> Task:
        """Returns the task of some of the texts, with the references that they have."""
        context, target = ([column[i] for i in rows] for column in (self.context, self.target))
        references, own = self.references.tolist(), self.own[list(rows)].tolist()
        return _task(self.name, references, own, context, target, self.separator)


def read_passages(path: str | Path) -> list[Passage]:
    """Reads the passages of a file; raises `TextError` if it is not in SQuAD's format."""
    passages = read_squad(path)
    if passages is None:
        raise TextError(f"{path} is not a file of questions in SQuAD's format; give one (.json)")
    return passages


def read_question_task(
    path: str | Path, encode: Encode, decode: Decode, W: int, most: int, seed: int = 0
) -> Task:
    """Reads questions whose answers stand in the first W tokens of their paragraph.

    Args:
      path: a file in SQuAD's format.
      encode, decode: convert a text to tokens and back.
      W: tokens of a reference; shorter paragraphs are left out.
      most: number of questions, drawn by `seed` among at most two for a paragraph.

    Raises:
      TextError: the file is not in SQuAD's format, or has no such question.
    """
    references: list[list[int]] = []
    drawn: list[tuple[int, str, str]] = []
    for passage in read_passages(path):
        tokens = encode(passage.text)
        if len(tokens) < W:
            continue
        inside, end = [], len(decode(tokens[:W]))
        for question in passage.questions:
            answer = next(iter(question.answers), "")
            if answer and 0 <= question.start <= end - len(answer) and len(answer) < 40:
                inside.append((len(references), question.text, answer))
        if inside:
            references.append(tokens[:W])
            drawn += inside[:2]
    if not drawn:
        raise TextError(f"{path}: no paragraph of {W} tokens holds the answer of a question")
    random.Random(seed).shuffle(drawn)
    chosen = drawn[:most]
    return _task(
        "questions",
        references,
        [index for index, _, _ in chosen],
        [encode(f"{SHOTS}{question}\nAnswer:") for _, question, _ in chosen],
        [encode(f" {answer}\n") for _, _, answer in chosen],
        encode("\n\n"),
    )


def read_continuation_task(
    texts: Iterable[str], encode: Encode, W: int, length: int, most: int
) -> Task:
    """Cuts texts into a reference of W tokens and the `length` tokens that follow it.

    Raises `TextError` if fewer than two texts are long enough.
    """
    rows: list[list[int]] = []
    for text in texts:
        tokens = encode(text)
        if len(tokens) > W + length:
            rows.append(tokens[: W + length + 1])
        if len(rows) == most:
            break
    if len(rows) < 2:
        raise TextError(f"fewer than two of the texts have {W + length + 1} tokens")
    own = list(range(len(rows)))
    starts, rest = [row[W : W + 1] for row in rows], [row[W + 1 :] for row in rows]
    return _task("continuation", [row[:W] for row in rows], own, starts, rest, [])


def _task(
    name: str,
    references: list[list[int]],
    own: list[int],
    context: list[list[int]],
    target: list[list[int]],
    separator: list[int],
) -> Task:
    """Makes a task of the references that are used."""
    used, index = np.unique(own, return_inverse=True)
    rows = np.array([references[i] for i in used], np.int32)
    return Task(name, rows, index, context, target, separator)


class Reader:
    """Computes the nats of a task's texts for one model.

    Args:
      config: a validated config; `memory.counts` and `memory.selection` say what memories hold.
      params: parameters of the model that reads.
      prefix_tokens: prefix of references and texts.
      rows: rows of a call with one memory each; with several, correspondingly fewer.
      writer: parameters of the model that writes; default those of the reader.
    """

    def __init__(
        self,
        config: ConfigDict,
        params: Params,
        prefix_tokens: tuple[int, ...],
        rows: int = 8,
        writer: Params | None = None,
    ):
        self.writer = params if writer is None else writer
        config = config.copy_and_resolve_references()
        self.config, self.params, self.prefix, self.rows = config, params, prefix_tokens, rows
        self._models: dict[tuple[int, bool], Any] = {}

    def nats(
        self,
        task: Task,
        memories: ExplicitMemory | None = None,
        read: Int[np.ndarray, "n M"] | None = None,
        text: Int[np.ndarray, "n M"] | None = None,
    ) -> Float[np.ndarray, " n"]:
        """Returns the mean nats per predicted token of every text.

        Args:
          task: the texts.
          memories: memories of `task.references` (`write`).
          read: indices of the memories that each text reads; None: none.
          text: indices of the references that stand in front of each text; None: none.
        """
        n = len(task)
        # Without memories the prefix is a part of the row: no positions are left for memories.
        begin = [] if read is not None else list(self.prefix)
        fronts = [begin] * n
        if text is not None:
            fronts = [
                begin + [t for i in row for t in (*task.references[i].tolist(), *task.separator)]
                for row in text
            ]
        before = [front + context for front, context in zip(fronts, task.context, strict=True)]
        rows = [a + b for a, b in zip(before, task.target, strict=True)]
        order = sorted(range(n), key=lambda i: len(rows[i]))
        size = self.rows if max(map(len, rows)) <= 512 else max(1, self.rows // 2)
        result = np.zeros(n)
        for low in range(0, n, size):
            batch = order[low : low + size]
            T = -(-max(len(rows[i]) for i in batch) // 64) * 64
            tokens, targets, weights = (np.zeros((size, T), np.int32) for _ in range(3))
            for line, i in enumerate(batch):
                row = rows[i]
                tokens[line, : len(row)] = row
                targets[line, : len(row) - 1] = row[1:]
                weights[line, len(before[i]) - 1 : len(row) - 1] = 1
            memory = None
            if read is not None:
                assert memories is not None
                places = np.zeros((size, read.shape[1]), np.int64)
                places[: len(batch)] = read[batch]
                keys, values = (x[:, places][:, :, None] for x in memories[:2])
                length = memories.length[places][:, None]
                memory = ExplicitMemory._make((keys, values, length))
            losses = self._losses(T, read is not None)(self.params, tokens, targets, memory)
            sums = (np.asarray(losses) * weights).sum(1)[: len(batch)]
            result[batch] = sums / weights.sum(1)[: len(batch)]
        return result

    def _losses(self, T: int, with_memory: bool) -> Any:
        """Returns the compiled losses of rows of T tokens, which are one chunk."""
        if (T, with_memory) not in self._models:
            with self.config.unlocked():
                self.config.memory.chunk_length, self.config.memory.window = T, 1
            model = make_model(self.config, self.prefix if with_memory else ())

            @jax.jit
            def losses(params: Params, tokens: Any, targets: Any, memory: Any) -> jax.Array:
                return model.token_losses(params, model.hidden(params, tokens, memory), targets)

            self._models[T, with_memory] = losses
        return self._models[T, with_memory]

    def write(self, references: Int[np.ndarray, "U W"]) -> ExplicitMemory:
        """Writes memories of references, in the axes that the model reads."""
        model = make_model(self.config, self.prefix)
        encode = jax.jit(functools.partial(model.encode, sparsify=sparsifier(self.config.memory)))
        parts = []
        for low in range(0, len(references), self.rows):
            part = references[low : low + self.rows]
            padded = np.pad(part, ((0, self.rows - len(part)), (0, 0)))
            written = jax.device_get(encode(self.writer, jnp.asarray(padded)))
            keys, values = (x[:, : len(part)] for x in written[:2])
            parts.append((keys, values, written.length[: len(part)]))
        sides: Any = list(zip(*parts, strict=True))
        keys, values = (np.concatenate(x, axis=1) for x in sides[:2])
        return ExplicitMemory._make((keys, values, np.concatenate(sides[2])))


def readings(task: Task) -> dict[str, Int[np.ndarray, "n M"]]:
    """Returns the memories of each condition, the nearest first: own, five with the own one nearest
    or farthest (the same thing unless `memory.spacing` is set), wrong, five wrong.

    Raises `TextError` if there are too few references for wrong ones to be wrong.
    """
    U = len(task.references)
    farthest = max(max(shifts) for shifts in OTHERS.values())
    if farthest >= U:
        raise TextError(
            f"{task.name}: {U} references are too few for wrong ones; give at least {farthest + 1}"
        )
    own = task.own[:, None]
    return {
        "own": own,
        **{name: (own + np.array(shifts)[None]) % U for name, shifts in OTHERS.items()},
    }


def texts_in_front(task: Task) -> dict[str, Int[np.ndarray, "n M"]]:
    """Returns the references in front of each text, for those of `readings` that text can give."""
    read = readings(task)
    return {name: read[name][:, ::-1] for name in ("own", "five", "five, own farthest")}


def summarize(
    nats: Float[np.ndarray, " n"], none: Float[np.ndarray, " n"], text: Float[np.ndarray, " n"]
) -> dict[str, float]:
    """Returns mean nats and worth with standard errors; that of the worth by the delta method."""
    n = len(nats)
    gain, whole = float((none - nats).mean()), float((none - text).mean())
    worth = gain / whole
    spread = (none - nats) - worth * (none - text)
    return {
        "nats": float(nats.mean()),
        "error": float(nats.std(ddof=1) / n**0.5),
        "worth": worth,
        "worth_error": float(spread.std(ddof=1) / n**0.5 / abs(whole)),
    }


def measure_worth(
    task: Task, reader: Reader, configs: Sequence[tuple[str, ConfigDict]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Measures a task without memories, with text, and with the memories of every config.

    Returns for each of `nothing`, `text` and the names of `configs` the conditions of `readings`,
    each summarized.
    """
    none = reader.nats(task)
    fronts = {name: reader.nats(task, text=x) for name, x in texts_in_front(task).items()}
    text = fronts["own"]
    report = {"nothing": {"none": summarize(none, none, text)}}
    report["text"] = {name: summarize(nats, none, text) for name, nats in fronts.items()}
    for name, config in tqdm(configs, desc=task.name, unit=" settings"):
        own = Reader(config, reader.params, reader.prefix, reader.rows, reader.writer)
        memories = own.write(task.references)
        report[name] = {
            condition: summarize(own.nats(task, memories, read), none, text)
            for condition, read in readings(task).items()
            if config.memory.spacing or condition != "five, own farthest"
        }
    return report


def settings(
    config: ConfigDict,
    weights: TokenWeights,
    budgets: Sequence[int],
    rules: Sequence[str] = RULES,
) -> Iterator[tuple[str, ConfigDict]]:
    """Yields name and config of every setting of the table: each budget, spent by the `rules`.

    `heads`: a quarter of it in every head, the rest where it matters (`deal_counts`), with the
    config's `memory.key_scale` and `memory.spacing`, which are 1 and 0 in the others; `uniform`:
    the same number in every head, by attention received; `paper`: the same, by the paper's rule. At
    last, without a budget, `all`: all keys and values of every token.
    """

    def changed(name: str, **memory: Any) -> tuple[str, ConfigDict]:
        own = config.copy_and_resolve_references()
        with own.unlocked():
            own.memory.update(heads="", counts="", each=0, key_scale=1.0, spacing=0)
            own.memory.update(memory)
        return name, own

    layers = memory_layers(config.memory)
    for budget in budgets:
        each = budget // 4
        counts = format_counts(deal_counts(weights, budget, each), layers)
        of_reader = {name: config.memory[name] for name in ("key_scale", "spacing")}
        dealt = {"counts": counts, "each": each, **of_reader}
        spent = {
            "heads": dealt | {"selection": RECONSTRUCTION},
            "uniform": {"kept_tokens": budget, "selection": "received"},
            "paper": {"kept_tokens": budget, "selection": "exact"},
        }
        for name in rules:
            if name in spent:
                yield changed(f"{budget} {name}", **spent[name])
    if "all" in rules:
        yield changed("all", kept_tokens=config.memory.reference_length, selection="exact")


def worth_report(
    config: ConfigDict,
    workdir: str | Path,
    checkpoint: str | Path | None = None,
    *,
    documents: str | Path,
    questions: str | Path | None = None,
    budgets: Sequence[int] = (16,),
    rules: Sequence[str] = RULES,
    most: int = 96,
    calibration: int = 24,
    skip: int = 0,
) -> dict[str, Any]:
    """Measures what memories of several budgets and rules are worth, on questions and continuation.

    Args:
      config: a validated config; its memory layers are the candidates.
      workdir: a workdir with tokenizer and checkpoint.
      checkpoint: stage folder or `checkpoints/<step>`; default `workdir/<stage>`. If it was trained
        on memories of another checkpoint, that one writes.
      documents: texts to go on from, of which the first `calibration` long ones deal the counts.
      questions: file of paragraphs and questions in SQuAD's format; None: no such task.
      budgets: tokens of a memory, per memory layer and key-value head.
      rules: of `RULES`, as `settings` explains them.
      most: texts of a task.
      calibration: references for the counts; never texts of the tasks.
      skip: long documents to leave out, for another set of texts.

    Raises:
      CheckpointError, TextError: a part is missing, or there are too few texts.
      ConfigError: a budget is above the tokens of a reference, or a rule is unknown.
    """
    unknown = [rule for rule in rules if rule not in RULES]
    if unknown:
        raise ConfigError(f"rule {unknown[0]!r} of spending a budget; known: {', '.join(RULES)}")
    for budget in budgets:
        check_budget(budget, budget // 4, config.memory.reference_length)
    check_documents(read_documents(str(documents)))
    if questions is not None:
        read_passages(questions)
    Mirror.of(workdir).fetch("tokenizer")
    tokenizer = Tokenizer.load(Path(workdir) / "tokenizer")
    checkpoint = named_checkpoint(checkpoint, workdir, config.stage)
    model = make_model(config, PREFIX_TOKENS)
    params, meta = restore_params(checkpoint, model, tokenizer_fingerprint=tokenizer.fingerprint)
    writer = params
    if meta["writer"] is not None:
        writer = restore_writer(checkpoint, model, tokenizer.fingerprint).params
    W = config.memory.reference_length

    def encode(text: str) -> list[int]:
        return [int(token) for token in tokenizer.encode(text)]

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens)

    texts = (document.text for document in read_documents(str(documents)))
    enough = calibration + skip + most
    long_ones = read_continuation_task(texts, encode, W, W, enough)
    if len(long_ones) <= calibration + skip:
        raise TextError(
            f"of {len(long_ones)} long documents, {calibration} deal the counts and {skip} are left"
            " out (--skip), so that none is left to go on from; give more, or skip fewer"
        )
    weights = measure_weights(config, writer, long_ones.references[:calibration], PREFIX_TOKENS)
    first = calibration + skip
    tasks = [long_ones.part(range(first, len(long_ones)))]
    if questions is not None:
        tasks.insert(0, read_question_task(questions, encode, decode, W, most, seed=skip))
    reader = Reader(config, params, PREFIX_TOKENS, writer=writer)
    chosen = list(settings(config, weights, budgets, rules))
    figures = {task.name: measure_worth(task, reader, chosen) for task in tasks}
    about = {"checkpoint": str(checkpoint), "step": meta["step"], "calibration": calibration}
    return {**about, "texts": {task.name: len(task) for task in tasks}, "tasks": figures}


def worth_table(report: dict[str, Any]) -> str:
    """Returns the report of `worth_report` as Markdown: nats and worth of every condition."""
    conditions = ("own", *OTHERS)
    lines = [f"{report['checkpoint']} step {report['step']}; nats a token, in brackets the worth"]
    for task, rows in report["tasks"].items():
        none = rows["nothing"]["none"]
        lines += [
            "",
            f"{task}, {report['texts'][task]} texts; with nothing {none['nats']:.3f} ±"
            f" {none['error']:.3f}",
            "",
            f"| what the reader has | {' | '.join(conditions)} |",
            "|---" * (len(conditions) + 1) + "|",
        ]
        for name, row in rows.items():
            cells = [
                f"{row[c]['nats']:.3f} ({row[c]['worth']:.2f} ± {row[c]['worth_error']:.2f})"
                if c in row
                else ""
                for c in conditions
            ]
            if name != "nothing":
                lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
