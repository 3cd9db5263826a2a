"""SIGTERM: noted, so that the step in progress can end and the run be saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import jax

from m3jax.train.checkpoints import Checkpoints


class Termination:
    """Notes SIGTERM while it is entered."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints, self._noted = checkpoints, False
        self._previous: Any = None
        # With several processes JAX's own service notes the signal and agrees on a step.
        self._ours = (
            jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        )

    def __enter__(self) -> Termination:
        if self._ours:
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True

    def requested(self, step: int) -> bool:
        """Returns whether to stop after this step, alike on all processes."""
        if jax.process_count() > 1:  # said once; remembered where the guard goes back in between
            self._noted = self._noted or self._checkpoints.reached_preemption(step)
        return self._noted
