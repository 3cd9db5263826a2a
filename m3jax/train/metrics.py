"""Metrics of a stage: the JSON lines of `metrics.jsonl`, TensorBoard events, and a summary.

Every line has `crc32c`, the CRC-32C of all lines up to it (without this key), and every checkpoint
records that of the last line before it: so a reader knows that no line was changed or lost.
"""

from __future__ import annotations

import datetime
import functools
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import crc32c
import jax
from jax.tree_util import keystr
from ml_collections import ConfigDict
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from m3jax.checkpoint import FOLDER
from m3jax.errors import CheckpointError
from m3jax.files import json_text, write_atomically
from m3jax.train.guard import describe
from m3jax.train.stage_files import StageFiles, joined

FILE, EVENTS = "metrics.jsonl", "tensorboard"
_FLUSHED_EVERY = 60  # seconds
META = "metrics"  # key of a checkpoint's `meta`: checksum of the lines before it
_SUM = "crc32c"
_LOST = "lost"  # key of the first line of a file that replaces a lost one: its checksum


def read_metrics(stage_folder: str | Path, upto: int | None = None) -> list[dict[str, Any]]:
    """Reads the lines of a stage's metrics, up to a last line that a kill has cut off.

    Numbers that were not finite, null in the file, are NaN. Files without checksums, which older
    versions wrote, are read as they are. A long file that was copied from a bucket by other means
    needs its parts beside it (`m3jax.train.stage_files`).

    Args:
      stage_folder: folder of the stage.
      upto: checksum of lines that must be there, as a checkpoint records it.

    Raises:
      CheckpointError: a line was changed, or lines are missing.
    """
    path = Path(stage_folder) / FILE
    texts = [b""]
    if path.exists():
        texts = joined(path.read_bytes(), functools.partial(_read, path.parent)).split(b"\n")
    lines, total, there = [], 0, upto is None or not path.exists()
    for number, text in enumerate(texts, 1):
        if number == len(texts) and not _is_whole(text):
            break  # cut off, or empty behind the last line feed
        try:
            line = json.loads(text, object_hook=_with_nan)
            stored = line.pop(_SUM, None)
        except (ValueError, AttributeError, TypeError) as error:
            raise _damaged(path, f"line {number} is damaged") from error
        if stored is not None or total:
            total = crc32c.crc32c(_to_line(line).encode(), total)
            if stored != total:
                raise _damaged(path, f"line {number} is damaged, or lines before it are missing")
        lines.append(line)
        there = there or upto in (total, line.get(_LOST))
    if lines and not total:  # of an older version
        return lines
    if not there:
        raise _damaged(path, "lines are missing that were written before the last checkpoint")
    return lines


def _read(folder: Path, name: str) -> bytes | None:
    path = folder / name
    return path.read_bytes() if path.is_file() else None


def _with_nan(numbers: dict[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in numbers.items()}


def _is_whole(text: bytes) -> bool:
    """Returns True if a line holds a whole JSON value, and perhaps something behind it."""
    try:
        json.JSONDecoder().raw_decode(text.decode("utf-8", "replace"))
    except ValueError:
        return False
    return True


def _damaged(path: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {how}; restore it from a copy, or move it elsewhere: the run then goes on without"
        " what was logged before"
    )


def time_spent(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Sums up the time of a run by part, over all its starts, from lines of `read_metrics`.

    Returns:
      `goodput`, the share of the time since the first start that was spent on steps whose results
      were kept; `seconds` since the first start; of these the seconds of `step`, `data_wait`,
      `checkpoint`, `evaluation` and `start` in the kept lines; and `lost`, the rest: repeated
      steps, and the time between the end of a process and the next start. {} if no line has times.
    """
    timed = [line for line in lines if "time" in line]
    if not timed:
        return {}
    spent = Counter[str]()
    for line in timed:
        spent.update(line["time"])
    elapsed = timed[-1]["since_first_start"]
    lost = max(0.0, elapsed - sum(spent.values()))
    return {"goodput": timed[-1]["goodput"], "seconds": elapsed, **spent, "lost": lost}


def describe_time(spent: Mapping[str, float]) -> str:
    """Describes the result of `time_spent` in a sentence."""
    if not spent:
        return "not measured"
    total = max(1e-9, spent["seconds"])
    names = {
        "data_wait": "waiting for data",
        "checkpoint": "checkpoints",
        "evaluation": "evaluations",
        "start": "starts and compiling",
        "lost": "lost between starts",
    }
    parts = ", ".join(f"{spent[part] / total:.0%} {name}" for part, name in names.items())
    duration = datetime.timedelta(seconds=round(spent["seconds"]))
    return f"{duration} since the first start: {spent['goodput']:.0%} steps (goodput), {parts}"


def retrieval_shares(
    counts: Mapping[str, float], before: Mapping[str, float] = {}
) -> dict[str, float]:
    """Computes the shares of dropped references and cache hits between two reports of a pipeline.

    Returns:
      `dropped_share`, the share of retrieved references dropped for their overlap with the text,
      and `cache_hit_share`, the share of memories read from the cache; each only if references or
      memories were read between the reports.
    """
    shares = {}
    for name, part, rest in (
        ("dropped_share", "dropped", "returned"),
        ("cache_hit_share", "cache_hits", "cache_misses"),
    ):
        new = {key: counts.get(key, 0) - before.get(key, 0) for key in (part, rest)}
        if sum(new.values()) > 0:
            shares[name] = new[part] / sum(new.values())
    return shares


def bank_speed(
    counts: Mapping[str, float], before: Mapping[str, float], seconds: float
) -> dict[str, float]:
    """Computes `bank_bytes_per_second`, what a host reads of its bank, between two reports of a
    pipeline that are `seconds` apart; {} if nothing was read."""
    read = counts.get("bank_bytes", 0) - before.get("bank_bytes", 0)
    return {"bank_bytes_per_second": read / max(seconds, 1e-9)} if read > 0 else {}


class Metrics:
    """Writes the metrics of one run.

    Opening drops the lines logged after the checkpoint that the run continues from, so that no step
    is logged twice. The first line records when the run was first started. Each rollback of a
    guarded run has a line `{"step", "guard"}` after the lines of the step that it went back to.

    Args:
      stage_folder: folder of the stage.
      step: step of the checkpoint that the run continues from, 0 for a new run.
      running: seconds that this process has spent on the run so far.
      now: returns the time in seconds since 1970.
      rollbacks: rollbacks of the run, see `m3jax.train.guard.read_rollbacks`.
      upto: see `read_metrics`.

    Attributes:
      seconds: run time up to `step`, summed over all starts of the run.
      checksum: checksum of all lines so far.
    """

    def __init__(
        self,
        stage_folder: str | Path,
        step: int,
        running: float = 0.0,
        now: Callable[[], float] = time.time,
        rollbacks: Sequence[Mapping[str, Any]] = (),
        upto: int | None = None,
    ):
        folder = Path(stage_folder)
        kept = [line for line in read_metrics(folder, upto) if line["step"] <= step]
        kept = _with_rollbacks([line for line in kept if "guard" not in line], rollbacks)
        if not any("started" in line for line in kept):
            lost = {} if upto is None else {_LOST: upto}
            kept.insert(0, {"step": 0, "started": now() - running, **lost})
        self._now = now
        self._started = next(line["started"] for line in kept if "started" in line)
        self._stepping = sum(line["time"]["step"] for line in kept if "time" in line)
        self.checksum = 0
        text = "".join(map(self._summed, kept))
        write_atomically(folder / FILE, text.encode())
        self.seconds: float = max((line.get("seconds", 0.0) for line in kept), default=0.0)
        self._file = open(folder / FILE, "a", encoding="utf-8")  # noqa: SIM115 (closed in `close`)
        self._events = _Events(folder / EVENTS, step + 1)

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line; `step` is among its keys. Numbers in it become TensorBoard scalars.

        A line with `time`, seconds by part, gets `goodput` and `since_first_start` (`time_spent`).
        """
        if "time" in line:
            self._stepping += line["time"]["step"]
            elapsed = max(1e-9, self._now() - self._started)
            line = {**line, "goodput": self._stepping / elapsed, "since_first_start": elapsed}
        self._file.write(self._summed(line))
        self._file.flush()
        for path, value in jax.tree.leaves_with_path(line):
            name = keystr(path, simple=True, separator="/")
            if name != "step" and isinstance(value, (int, float)):
                self._events.write(int(line["step"]), summary=scalar(name, value))

    def _summed(self, line: Mapping[str, Any]) -> str:
        """Formats a line, with the checksum of all lines up to it."""
        self.checksum = crc32c.crc32c(_to_line(line).encode(), self.checksum)
        return _to_line({**line, _SUM: self.checksum})

    def sync(self) -> None:
        """Forces all lines to disk, so that no checkpoint is ahead of the metrics."""
        os.fsync(self._file.fileno())
        self._events.flush()

    def close(self) -> None:
        self._file.close()
        self._events.close()


class _Events:
    """Writes TensorBoard events of the steps from `first` on, in place of earlier ones.

    In the thread that calls, not as tensorboardX does in its own: a full disk is then an error of
    the run, and nothing is written when the interpreter ends.
    """

    def __init__(self, folder: Path, first: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._writer, self._flushed = EventsWriter(str(folder / "events")), time.monotonic()
        self.write(first, file_version="brain.Event:2")
        self.write(first, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, **content: Any) -> None:
        """Writes an event with the `Event` fields `content`; TensorBoard sees it in a minute."""
        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))
        if time.monotonic() - self._flushed > _FLUSHED_EVERY:
            self.flush()

    def flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


def _with_rollbacks(
    lines: list[dict[str, Any]], rollbacks: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Inserts a line for every rollback, at a place that does not depend on kills in between."""
    place = None
    for rollback in reversed(rollbacks):  # a later rollback may have gone back further
        place = rollback["to"] if place is None else min(place, rollback["to"])
        number = sum(line["step"] <= place for line in lines if "guard" not in line)
        lines = [*lines[:number], {"step": place, "guard": dict(rollback)}, *lines[number:]]
    return lines


def _to_line(line: Mapping[str, Any]) -> str:
    return json_text(line, ensure_ascii=False) + "\n"


class Summary(NamedTuple):
    """Outcome of a stage; `str` formats it as lines of text.

    Attributes:
      stage: name of the stage.
      step: step of the last checkpoint.
      checkpoint: folder of the last checkpoint.
      seconds: run time over all starts.
      loss, accuracy: of the last logged line (`mean_loss`, `mean_accuracy` of the step).
      evaluation: numbers of the last evaluation, {} if there was none.
      time: see `time_spent`.
      rollbacks: rollbacks of the guard, see `m3jax.train.guard.read_rollbacks`.
    """

    stage: str
    step: int
    checkpoint: str
    seconds: float
    loss: float
    accuracy: float
    evaluation: dict[str, float]
    time: dict[str, float]
    rollbacks: list[dict[str, Any]]

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.stage}: loss {self.loss:.4f} after {self.step} steps",
                *(f"  {name}: {value:.4f}" for name, value in self.evaluation.items()),
                *(f"  {describe(rollback)}" for rollback in self.rollbacks),
                f"checkpoint: {self.checkpoint}",
                f"time: {describe_time(self.time)}",
            ]
        )


def summarize(config: ConfigDict, folder: Path) -> Summary:
    """Returns the summary of a finished stage, from the metrics in its folder."""
    lines = read_metrics(folder)
    trained = [line for line in lines if "loss" in line][-1:]
    evaluated = [line["evaluation"] for line in lines if "evaluation" in line][-1:]
    return Summary(
        stage=config.stage,
        step=config.train.steps,
        checkpoint=f"{StageFiles(folder).place}/{FOLDER}/{config.train.steps}",
        seconds=max((line.get("seconds", 0.0) for line in lines), default=0.0),
        loss=trained[0]["loss"] if trained else math.nan,
        accuracy=trained[0]["accuracy"] if trained else math.nan,
        evaluation=evaluated[0] if evaluated else {},
        time=time_spent(lines),
        rollbacks=[line["guard"] for line in lines if "guard" in line],
    )
