"""Detects loss spikes and divergence of a run from its losses and gradient norms, step by step.

Losses of batches are noisy, with long tails. Their normal level is therefore the median of the last
steps, and their normal deviation the median absolute deviation (MAD), neither of which a few wild
steps move. A normal distribution's standard deviation is 1.4826 · MAD.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

NOT_FINITE, SPIKE, DIVERGENCE = "not_finite", "spike", "divergence"
_SCALE = 1.4826  # standard deviation over MAD of a normal distribution
_LEAST_NORM = 1e-30  # a batch without weight has a gradient of 0, which has no logarithm


class Trouble(NamedTuple):
    """Trouble of a run: `spike` is several bad steps close together, `divergence` a rising loss."""

    reason: str  # `not_finite`, `spike` or `divergence`
    first: int  # first bad step, from 1; of a divergence, the step after the last good one
    last: int  # last bad step; of a divergence, `first`, since no single batch caused it
    seen: int  # step at which the trouble was detected
    words: str  # measured values, as text for users


class Monitor:
    """Watches the steps of a run, one after the other.

    Its answers depend on the observed values alone, and `state` returns everything that it
    remembers, so that a run that continues from a checkpoint gets the same answers.

    Args:
      config: a config; the monitor reads its section `guard`.
      state: result of an earlier monitor's `state()`; {} for a new run.
    """

    def __init__(self, config: ConfigDict, state: Mapping[str, Any]):
        self.options = options = config.guard
        self._losses = deque[float](state.get("losses", ()), options.window)
        self._norms = deque[float](state.get("norms", ()), options.window)
        self._bad = list(state.get("bad", ()))  # bad steps among the last 2 · patience
        self._best = float(state.get("best", math.inf))  # lowest level (median of recent losses)
        self._calm = int(state.get("calm", 0))  # last step with a level near the lowest
        self._usual = float(state.get("usual", math.inf))  # deviation of losses at that step
        self._recent = options.window // 4

    def state(self) -> dict[str, Any]:
        """Returns everything that the monitor remembers, as JSON values."""
        if not self._losses:
            return {}
        lists = {"losses": self._losses, "norms": self._norms, "bad": self._bad}
        state = {"best": self._best, "calm": self._calm, "usual": self._usual}
        return {name: list(values) for name, values in lists.items()} | state

    def losses(self, step: int, after: int) -> list[tuple[int, float]]:
        """Returns (step, loss) of the steps after `after` that it remembers; the last is `step`."""
        first = step - len(self._losses) + 1
        return [(i, x) for i, x in enumerate(self._losses, first) if i > after]

    def observe(self, step: int, loss: float, gradient_norm: float) -> Trouble | None:
        """Records loss (nats per token) and gradient norm of a step; returns trouble, or None."""
        spike = None
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            words = f"loss {loss}, gradient norm {gradient_norm}"
            self._losses.append(loss)
            return Trouble(NOT_FINITE, step, step, step, words)
        norm = math.log(max(gradient_norm, _LEAST_NORM))
        patience = self.options.patience
        if len(self._losses) >= self._recent:
            words = self._unusual(loss, norm)
            self._bad = [bad for bad in self._bad if bad > step - 2 * patience]
            if words:
                self._bad.append(step)
            if len(self._bad) >= patience:
                spike = Trouble(SPIKE, self._bad[0], step, step, words)
        self._losses.append(loss)
        self._norms.append(norm)
        return spike or self._risen(step)

    def _unusual(self, loss: float, norm: float) -> str:
        """Returns the reason why a step is bad, or ""."""
        median, deviation = self._normal(self._losses)
        if loss > median + self.options.loss_deviations * deviation:
            return f"loss {loss:.4g}, median {median:.4g}, deviation {deviation:.2g}"
        usual, spread = self._normal(self._norms)
        if loss > median and norm > usual + self.options.norm_deviations * spread:
            now, expected = math.exp(min(norm, 700.0)), math.exp(min(usual, 700.0))
            return f"gradient norm {now:.4g}, median {expected:.4g}; loss {loss:.4g}"
        return ""

    def _risen(self, step: int) -> Trouble | None:
        """Detects divergence: the median of recent losses is far above its lowest in the run."""
        values = np.array(self._losses)
        level = _median(values[-self._recent :])
        self._best = min(self._best, level)
        # A rising loss inflates the deviation: it counts at most as much as at the last calm step.
        noise = self._noise(values)
        deviation = min(noise, self._usual) if len(values) >= self._recent else noise
        allowed = self.options.rise_deviations * deviation
        if level <= self._best + allowed / 4:
            self._calm, self._usual = step, noise
        if len(values) < self._recent or level <= self._best + allowed:
            return None
        words = f"median loss of {self._recent} steps {level:.4g}, lowest before {self._best:.4g}"
        return Trouble(DIVERGENCE, self._calm + 1, self._calm + 1, step, words)

    def _noise(self, values: np.ndarray) -> float:
        """Returns a robust standard deviation of the losses.

        In the first window of a run the losses may follow a trend; then the differences of
        neighbouring losses, which contain no trend, limit the estimate.
        """
        noise = self._normal(self._losses)[1]
        if 1 < len(values) < self.options.window:
            between = _SCALE * _median(np.abs(np.diff(values))) / math.sqrt(2)
            noise = min(noise, max(between, self.options.least_deviation))
        return noise

    def _normal(self, values: deque[float]) -> tuple[float, float]:
        """Returns the median and a robust standard deviation."""
        array = np.array(values)
        median = _median(array)
        spread = _SCALE * _median(np.abs(array - median))
        return median, max(spread, self.options.least_deviation)


def _median(values: np.ndarray) -> float:
    """Computes the median, five times as fast as `np.median` on arrays this small."""
    middle = len(values) // 2
    if len(values) % 2:
        return float(np.partition(values, middle)[middle])
    return float(np.partition(values, (middle - 1, middle))[middle - 1 : middle + 1].mean())
