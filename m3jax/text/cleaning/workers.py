"""Runners of parallel work: in this process, in several local processes, or in Apache Beam."""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from m3jax.errors import TextError
from m3jax.optional import optional

_AHEAD = 2  # tasks per process that are read ahead


def _alone(unit: Any) -> Iterable[Any]:
    return [unit]


@dataclass(frozen=True)
class WorkStage:
    """Describes tasks that may run in any order, once the previous stage has ended.

    The functions are sent to other processes, so they must be module-level functions or
    `functools.partial` of module-level functions. A task may run twice, even at the same time, and
    must then have the same result.

    Attributes:
      name: name of the stage, used in messages.
      units: lists the units of the stage; each is split by a single process.
      work: runs a task; its return value must be small.
      split: yields the tasks of a unit, one at a time; default: the unit is its only task.
    """

    name: str
    units: Callable[[], Iterable[Any]]
    work: Callable[[Any], Any]
    split: Callable[[Any], Iterable[Any]] = _alone

    def tasks(self) -> Iterator[Any]:
        """Yields the tasks of all units."""
        return itertools.chain.from_iterable(map(self.split, self.units()))


class LocalRunner:
    """Runs stages in this process or, for `workers` > 1, in local processes that it starts.

    Raises `TextError` for `workers` < 1.
    """

    def __init__(self, workers: int = 1) -> None:
        if workers < 1:
            raise TextError(f"--workers={workers}; expected at least 1")
        self._workers = workers

    def run(self, stages: Sequence[WorkStage]) -> None:
        """Runs all tasks, few of them in RAM at a time; `TextError` if a worker process dies."""
        if self._workers == 1:
            for stage in stages:
                for task in stage.tasks():
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
            for task in stage.tasks():
                waiting.add(pool.submit(stage.work, task))
                while len(waiting) >= self._workers * (1 + _AHEAD):
                    waiting = _finish(waiting)
            while waiting:
                waiting = _finish(waiting)
        finally:
            for future in waiting:
                future.cancel()


def _finish(waiting: set[Future[Any]]) -> set[Future[Any]]:
    done, waiting = concurrent.futures.wait(waiting, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
    return waiting


def _begin(threads: int) -> None:
    """Sets up a worker process: limits its threads, and ends it when its parent has ended."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # of the tokenizers
    parent = multiprocessing.parent_process()
    if parent is not None:

        def end_with_parent() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=end_with_parent, daemon=True).start()


class BeamRunner:
    """Runs stages as one Apache Beam pipeline: in this process or on Dataflow, Spark or Flink.

    Every worker must see the workdir under the same path: the pipeline's elements are small (or
    blocks of lines), and the stages write their results to files.
    """

    def __init__(self, options: Sequence[str] = ()) -> None:
        """Takes Beam's flags (default: run in this process); `TextError` if Beam is missing."""
        install = "-c constraints-beam.txt -e '.[prepare]' in an environment of its own"
        optional("apache_beam", "Apache Beam is not installed", install)
        self._options = list(options) or ["--runner=FnApiRunner"]

    def run(self, stages: Sequence[WorkStage]) -> None:
        """Runs the stages in order, and waits for their end; raises the `TextError` of a task."""
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions

        options = PipelineOptions(self._options, save_main_session=False)
        try:
            with beam.Pipeline(options=options) as pipeline:
                _build(pipeline, stages)
        except Exception as error:
            message = _user_error(error)
            if message is None:
                raise
            raise TextError(message) from error


def _build(pipeline: Any, stages: Sequence[WorkStage]) -> None:
    """Adds the stages; each takes the previous one's results as side input, to wait for its end."""
    import apache_beam as beam

    done = None
    for stage in stages:
        start = pipeline | f"{stage.name}: start" >> beam.Create([stage])
        before = () if done is None else (beam.pvalue.AsIter(done),)
        units = start | f"{stage.name}: units" >> beam.FlatMap(_units, *before)
        tasks = (
            units
            | f"{stage.name}: share units" >> beam.Reshuffle()
            | f"{stage.name}: split" >> beam.FlatMap(stage.split)
            | f"{stage.name}: share tasks" >> beam.Reshuffle()
        )
        done = tasks | f"{stage.name}: work" >> beam.Map(stage.work)


def _units(stage: WorkStage, before: Iterable[Any] = ()) -> Iterable[Any]:
    for _ in before:  # reading all of it waits for the end of the previous stage
        pass
    yield from stage.units()


def _user_error(error: BaseException | None) -> str | None:
    """Returns the message of the `TextError` in the chain of causes that Beam made, or None."""
    while error is not None:
        if isinstance(error, TextError):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


Runner = LocalRunner | BeamRunner
