"""Runner that makes Apache Beam pipelines: in this process, Dataflow, Spark, Flink.

Every worker must see the folder of the run, with the same path: the elements of the pipelines are
small (or blocks of lines), what the stages make is files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from m3jax.errors import TextError
from m3jax.text.cleaning.workers import WorkStage
from m3jax.text.optional import optional


class BeamRunner:
    """Runs stages as one pipeline each time, with Beam's own options."""

    def __init__(self, options: Sequence[str] = ()) -> None:
        """Checks that Beam is installed, and raises `TextError` if it is not.

        `options` are flags of Beam, such as `--runner=FlinkRunner`; default: the pipeline runs in
        this process.
        """
        install = "-c constraints-beam.txt -e '.[prepare]' in an environment of its own"
        optional("apache_beam", "Apache Beam is not installed", install)
        self._options = list(options) or ["--runner=FnApiRunner"]

    def run(self, stages: Sequence[WorkStage]) -> None:
        """Builds the pipeline of the stages, each behind the one before, and waits for its end.

        Raises:
          TextError: from a task, where the runner hands out its error.
        """
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions

        options = PipelineOptions(self._options, save_main_session=False)
        try:
            with beam.Pipeline(options=options) as pipeline:
                build(pipeline, stages)
        except Exception as error:
            message = _user_error(error)
            if message is None:
                raise
            raise TextError(message) from error


def build(pipeline: Any, stages: Sequence[WorkStage]) -> Any:
    """Adds the stages to a pipeline; returns the collection of the last one's results.

    A stage waits for the one before, whose results are its side input.
    """
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
    return done


def _units(stage: WorkStage, before: Iterable[Any] = ()) -> Iterable[Any]:
    for _ in before:  # all of them: then the stage before has ended
        pass
    yield from stage.units()


def _user_error(error: BaseException | None) -> str | None:
    """Returns the message of a `TextError` among an error, as Beam changed it, and its causes."""
    while error is not None:
        if isinstance(error, TextError):
            return str(error)
        error = error.__cause__ or error.__context__
    return None
