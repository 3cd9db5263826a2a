"""Reads tasks from local files; the fields of the first record decide the kind of the task.

| fields of a record | kind | scored |
|---|---|---|
| `query`, `choices`, `gold` | choice | the likeliest choice |
| columns of MMLU (.csv): question, four choices, answer | choice | the likeliest letter |
| `context_options`, `continuation`, `gold` | schema | the context with the likeliest continuation |
| `context`, `continuation`; or `prompt`, `answer` | continuation | whether it is the first choice |
| `question` or `context`, `answer`, `aliases`; SQuAD (.json) | open | exact match, F1 of answer |
| `context`, `chain_of_thought`, `answer` | number | the last number of an answer |

Files are JSON lines (or others that `reading.rows` reads), unless the table names another format.
`gold` is an index from 0. The few-shot
examples of `NAME_test.csv` come from `NAME_dev.csv` beside it, those of other files from the file
itself.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m3jax.errors import TextError
from m3jax.reading import ending, read_text, reason_of, rows, stem
from m3jax.text.listing import files_inside
from m3jax.text.open_question import ANSWER, QUESTION, answer_text, open_question, open_record
from m3jax.text.squad import Passage, read_squad

LETTERS = "ABCD"
_ENDINGS = (".jsonl", ".csv", ".json", ".parquet")

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


def task_files(
    paths: Sequence[str | Path], left_out: dict[str, list[str]] | None = None
) -> list[Path]:
    """Lists the named files and the files in named folders, without files of few-shot examples.

    `left_out` gets the other files of the folders, by reason.

    Raises:
      TextError: a path does not exist, a folder holds no task files, or two files have one name.
    """
    files: list[Path] = []
    left_out = {} if left_out is None else left_out
    for path in map(Path, paths):
        if not path.exists():
            raise TextError(f"there is no task file {path}")
        inside = [path]
        if path.is_dir():
            listed = (Path(part.path) for part in files_inside(str(path), _ENDINGS, left_out))
            inside = [p for p in listed if not (ending(p) == ".csv" and stem(p).endswith("_dev"))]
        if not inside:
            raise TextError(f"{path} holds no task files ({', '.join(_ENDINGS)})")
        files += inside
    names = [stem(path.name) for path in files]
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
    if ending(path) == ".csv":
        kind, docs = "choice", _read_mmlu(path)
        dev = path.with_name(path.name.replace("_test.csv", "_dev.csv"))
        shots = _read_mmlu(dev) if dev != path and dev.is_file() else None
    elif (passages := read_squad(path)) is not None:
        kind, docs = "open", _read_squad(path, passages)
    else:
        kind, docs = _read_rows(path)
    if not docs:
        raise TextError(f"{path} holds no examples")
    name = stem(path.name)
    name = name.removesuffix("_test") if ending(path) == ".csv" else name
    return LocalTask(name, kind, docs, shots)


def question_texts(
    paths: Sequence[str | Path], left_out: dict[str, list[str]] | None = None
) -> list[str]:
    """Returns the distinct questions of task files, without answers, choices and template.

    `left_out` is that of `task_files`.

    The question of a schema is its sentence with the right context.

    Raises:
      TextError: a file is missing or empty, or holds records of no known form.
    """
    docs = (doc for path in task_files(paths, left_out) for doc in read_task(path).docs)
    return list(dict.fromkeys(map(question_text, docs)))


def question_text(doc: Doc) -> str:
    """Returns the question of an example, without answer, choices and template."""
    if "contexts" in doc:
        return f"{doc['contexts'][doc['gold']]} {doc['continuation']}"
    text = doc.get("question") or doc["text"]
    if doc.get("choices") == list(LETTERS):
        text = text.partition(f"\n{LETTERS[0]}. ")[0]
    return text.removesuffix(ANSWER).removeprefix(QUESTION).strip()


def _read_rows(path: Path) -> tuple[str, list[Doc]]:
    """Returns the kind and the examples of a file of rows."""
    read = [(row.where, row.fields()) for row in rows(path)]
    if not read:
        raise TextError(f"{path} holds no examples; give lines of JSON objects")
    where, first = read[0]
    forms = [(kind, make) for needed, kind, make in _FORMS if needed <= first.keys()]
    if not forms:
        known = "; ".join(", ".join(sorted(needed)) for needed, _, _ in _FORMS)
        raise TextError(
            f"{where}: an example with the fields {', '.join(sorted(first)) or 'none'} is of no"
            f" known form; known: {known}"
        )
    kind, make = forms[0]
    docs = []
    for where, record in read:
        try:
            docs.append(make(record))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise TextError(
                f"{where}: not an example of the form of the file's first, {kind}"
                f" ({reason_of(error, record)})"
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
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    try:
        table = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise TextError(f"{path}:{reader.line_num}: not CSV: {error}") from error
    for number, row in table:
        if number == 1 and row[-1] == "answer":
            continue
        gold = row[5].strip() if len(row) == 6 else ""
        if gold not in places:
            raise TextError(
                f"{path}:{number}: expected a question, four choices and the answer, A–D or 0–3;"
                f" found {len(row)} columns" + (f", answer {gold!r}" if gold else "")
            )
        question, *choices = (text.strip() for text in row[:5])
        options = [f"\n{name}. {text}" for name, text in zip(LETTERS, choices, strict=True)]
        text = "".join([question, *options, ANSWER])
        docs.append({"text": text, "choices": list(LETTERS), "gold": places[gold]})
    return docs


def _read_squad(path: Path, passages: Sequence[Passage]) -> list[Doc]:
    """Returns the answerable questions of a file in the format of SQuAD, without passages."""
    questions = [question for passage in passages for question in passage.questions]
    try:
        return [open_question(q.text, q.answers) for q in questions if q.answers]
    except (TypeError, AttributeError, ValueError) as error:
        raise TextError(f"{path}: a question without text or answer ({error!r})") from error
