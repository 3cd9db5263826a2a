"""The error of this package."""


class InferenceError(ValueError):
    """A prompt or a setting that cannot work. The message names the thing and the remedy."""
