"""Runners of work that processes share: in this process, in several of this machine, or in Beam."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from m3jax.errors import TextError

_AHEAD = 2  # tasks of each process that are read before they are worked on


def _alone(unit: Any) -> Iterable[Any]:
    return [unit]


@dataclass(frozen=True)
class WorkStage:
    """Describes work that may be done in any order, once the stage before has ended.

    All three functions are sent to other processes: functions of modules, or `functools.partial` of
    those. The work of a task may be done twice, also at the same time, and must come to the same.

    Attributes:
      name: for progress and messages.
      units: lists the units, each split by one process from beginning to end.
      split: yields the tasks of a unit, one at a time; default: the unit is its only task.
      work: does a task; its result is small.
    """

    name: str
    units: Callable[[], Iterable[Any]]
    work: Callable[[Any], Any]
    split: Callable[[Any], Iterable[Any]] = _alone


@runtime_checkable
class Runner(Protocol):
    """Runs stages, one after the other."""

    def run(self, stages: Sequence[WorkStage]) -> None:
        """Returns when the work of all stages is done; an error of a task ends it."""


class LocalRunner:
    """Runs stages in this process, or in several that it starts."""

    def __init__(self, workers: int = 1) -> None:
        if workers < 1:
            raise TextError(f"--workers={workers}; expected at least 1")
        self._workers = workers

    def run(self, stages: Sequence[WorkStage]) -> None:
        """Does all tasks; few are held in memory at a time.

        Raises:
          TextError: from a task; or a process ended, for example for lack of memory.
        """
        if self._workers == 1:
            for stage in stages:
                for task in _tasks(stage):
                    stage.work(task)
            return
        spawn = multiprocessing.get_context("spawn")  # forking would copy locked locks
        threads = max(1, (os.cpu_count() or 1) // self._workers)
        with ProcessPoolExecutor(self._workers, spawn, _begin, (threads,)) as pool:
            for stage in stages:
                try:
                    self._share(pool, stage)
                except BrokenProcessPool as error:
                    raise TextError(
                        f"a process ended in the midst of the stage {stage.name!r}, perhaps for"
                        " lack of memory; run again, with fewer --workers: what is done is kept"
                    ) from error

    def _share(self, pool: ProcessPoolExecutor, stage: WorkStage) -> None:
        waiting: set[Future[Any]] = set()
        try:
            for task in _tasks(stage):
                waiting.add(pool.submit(stage.work, task))
                while len(waiting) >= self._workers * (1 + _AHEAD):
                    waiting = _finish(waiting)
            while waiting:
                waiting = _finish(waiting)
        finally:
            for future in waiting:
                future.cancel()


def _tasks(stage: WorkStage) -> Iterator[Any]:
    for unit in stage.units():
        yield from stage.split(unit)


def _finish(waiting: set[Future[Any]]) -> set[Future[Any]]:
    done, waiting = concurrent.futures.wait(waiting, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
    return waiting


def _begin(threads: int) -> None:
    """Sets up a new process: few threads, and an end when the process that started it has ended."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # of the tokenizers
    parent = multiprocessing.parent_process()
    if parent is not None:

        def end_with_parent() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=end_with_parent, daemon=True).start()
