"""Reads tasks from local files; the fields of the first record decide the kind of the task.

| fields of a record | kind | scored |
|---|---|---|
| `query`, `choices`, `gold` | choice | the likeliest choice |
| columns of MMLU (.csv): question, four choices, answer | choice | the likeliest letter |
| `context_options`, `continuation`, `gold` | schema | the context with the likeliest continuation |
| `context`, `continuation`; or `prompt`, `answer` | continuation | whether it is the first choice |
| `question` or `context`, `answer`, `aliases`; SQuAD (.json) | open | exact match, F1 of answer |
| `context`, `chain_of_thought`, `answer` | number | the last number of an answer |

Files are JSON lines, unless the table names another format. `gold` is an index from 0. The few-shot
examples of `NAME_test.csv` come from `NAME_dev.csv` beside it, those of other files from the file
itself.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m3jax.errors import TextError
from m3jax.text.jsonl import answer_text, read_records
from m3jax.text.open_question import ANSWER, QUESTION, open_question, open_record
from m3jax.text.squad import read_squad

LETTERS = "ABCD"
_SUFFIXES = (".jsonl", ".csv", ".json")

Doc = dict[str, Any]


class LocalTask(NamedTuple):
    """Task from a local file; all of its examples are of one kind.

    Attributes:
      name: file name without suffix.
      kind: see the table above.
      docs: examples. Fields of a choice: `text`, `choices`, `gold`; of a schema: `contexts`,
        `continuation`, `gold`; of a continuation: `text`, `continuation`; of an open question:
        `question`, `text`, `answers`; of a number: `text`, `target`, `answers`.
      shots: pool of few-shot examples; None takes them from `docs`.
    """

    name: str
    kind: str
    docs: list[Doc]
    shots: list[Doc] | None = None

    @property
    def chance(self) -> float | None:
        """Accuracy of guessing; None for kinds without choices."""
        name = {"choice": "choices", "schema": "contexts"}.get(self.kind)
        if name is None:
            return None
        return float(np.mean([1 / len(doc[name]) for doc in self.docs]))


def task_files(paths: Sequence[str | Path]) -> list[Path]:
    """Lists the named files and the files in named folders, without files of few-shot examples.

    Raises:
      TextError: a path does not exist, a folder holds no task files, or two files have one name.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise TextError(f"there is no task file {path}")
        inside = [path]
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES)
            inside = [p for p in inside if not p.name.endswith("_dev.csv")]
        if not inside:
            raise TextError(f"{path} holds no task files ({', '.join(_SUFFIXES)})")
        files += inside
    names = [path.stem for path in files]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise TextError(f"two task files have the name {min(twice)}; rename one")
    return files


def read_task(path: str | Path) -> LocalTask:
    """Reads the examples of a file.

    Raises:
      TextError: a file without examples, a file that cannot be read, or a record of no known form
        or of another form than the file's first.
    """
    path, shots = Path(path), None
    try:
        if path.suffix == ".csv":
            kind, docs = "choice", _read_mmlu(path)
            dev = path.with_name(path.name.replace("_test.csv", "_dev.csv"))
            shots = _read_mmlu(dev) if dev != path and dev.is_file() else None
        elif path.suffix == ".json":
            kind, docs = "open", _read_squad(path)
        else:
            kind, docs = _read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path} cannot be read: {error}") from error
    if not docs:
        raise TextError(f"{path} holds no examples")
    name = path.stem.removesuffix("_test") if path.suffix == ".csv" else path.stem
    return LocalTask(name, kind, docs, shots)


def question_texts(paths: Sequence[str | Path]) -> list[str]:
    """Returns the distinct questions of task files, without answers, choices and template.

    The question of a schema is its sentence with the right context.

    Raises:
      TextError: a file is missing or empty, or holds records of no known form.
    """
    docs = (doc for path in task_files(paths) for doc in read_task(path).docs)
    return list(dict.fromkeys(map(question_text, docs)))


def question_text(doc: Doc) -> str:
    """Returns the question of an example, without answer, choices and template."""
    if "contexts" in doc:
        return f"{doc['contexts'][doc['gold']]} {doc['continuation']}"
    text = doc.get("question") or doc["text"]
    if doc.get("choices") == list(LETTERS):
        text = text.partition(f"\n{LETTERS[0]}. ")[0]
    return text.removesuffix(ANSWER).removeprefix(QUESTION).strip()


def _read_lines(path: Path) -> tuple[str, list[Doc]]:
    """Returns the kind and the examples of a file of JSON lines."""
    records: list[Any] = read_records(path, lambda record: record, "examples", "a line of JSON")
    fields = set(records[0]) if isinstance(records[0], dict) else set()
    forms = [(kind, make) for needed, kind, make in _FORMS if needed <= fields]
    if not forms:
        known = "; ".join(", ".join(sorted(needed)) for needed, _, _ in _FORMS)
        raise TextError(
            f"{path}:1: an example with the fields {', '.join(sorted(fields)) or 'none'} is of no"
            f" known form; known: {known}"
        )
    kind, make = forms[0]
    docs = []
    for number, record in enumerate(records, 1):
        try:
            docs.append(make(record))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise TextError(
                f"{path}:{number}: not an example of the form of the file's first, {kind}"
                f" ({error!r})"
            ) from error
    return kind, docs


def _choice(record: Doc) -> Doc:
    gold = _gold(record, "choices")
    choices = [answer_text(choice, "choice").strip() for choice in record["choices"]]
    return {"text": record["query"].strip() + ANSWER, "choices": choices, "gold": gold}


def _schema(record: Doc) -> Doc:
    contexts, gold = record["context_options"], _gold(record, "context_options")
    continuation = answer_text(record["continuation"], "continuation").strip()
    contexts = [answer_text(context, "context").strip() for context in contexts]
    return {"contexts": contexts, "continuation": continuation, "gold": gold}


def _gold(record: Doc, name: str) -> int:
    gold, count = int(record["gold"]), len(record[name])
    if not 0 <= gold < count or count < 2:
        raise ValueError(f"gold = {gold} of {count} {name}")
    return gold


def _continuation(text: str, continuation: Any) -> Doc:
    return {
        "text": text.rstrip(),
        "continuation": " " + answer_text(continuation, "continuation").strip(),
    }


def _number(record: Doc) -> Doc:
    return {
        "text": QUESTION + record["context"].strip() + ANSWER,
        "target": f"{record['chain_of_thought'].strip()}\n#### {answer_text(record['answer'])}",
        "answers": [answer_text(record["answer"])],
    }


def _prompted(record: Doc) -> Doc:
    """Makes a continuation of a question of `evaluation.questions`, with its prompt unchanged."""
    return {"text": record["prompt"], "continuation": answer_text(record["answer"])}


# (fields, kind, function): the first entry all of whose fields a record has applies to it.
_FORMS: tuple[tuple[set[str], str, Callable[[Any], Doc]], ...] = (
    ({"query", "choices", "gold"}, "choice", _choice),
    ({"context_options", "continuation", "gold"}, "schema", _schema),
    (
        {"context", "continuation"},
        "continuation",
        lambda record: _continuation(record["context"], record["continuation"]),
    ),
    ({"context", "chain_of_thought", "answer"}, "number", _number),
    ({"question", "answer"}, "open", open_record),
    ({"context", "answer"}, "open", open_record),
    ({"prompt", "answer"}, "continuation", _prompted),
)


def _read_mmlu(path: Path) -> list[Doc]:
    """Reads questions of MMLU, whose answers are letters or indices from 0; skips a header."""
    places = {name: i for i, letter in enumerate(LETTERS) for name in (letter, str(i))}
    docs = []
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if not row or (number == 1 and row[-1] == "answer"):
                continue
            gold = row[5].strip() if len(row) == 6 else ""
            if gold not in places:
                raise TextError(
                    f"{path}:{number}: expected a question, four choices and the answer, A–D or"
                    f" 0–3; found {len(row)} columns" + (f", answer {gold!r}" if gold else "")
                )
            question, *choices = (text.strip() for text in row[:5])
            options = [f"\n{name}. {text}" for name, text in zip(LETTERS, choices, strict=True)]
            text = "".join([question, *options, ANSWER])
            docs.append({"text": text, "choices": list(LETTERS), "gold": places[gold]})
    return docs


def _read_squad(path: Path) -> list[Doc]:
    """Reads the answerable questions of a file in the format of SQuAD, without passages."""
    questions = [question for passage in read_squad(path) for question in passage.questions]
    try:
        return [open_question(q.text, q.answers) for q in questions if q.answers]
    except (TypeError, AttributeError, ValueError) as error:
        raise TextError(f"{path}: a question without text or answer ({error!r})") from error
