"""Errors that a user can act on: each message names the thing and the remedy."""

from __future__ import annotations


class UserError(ValueError):
    """Base class: launch scripts print the message without a traceback and end with code 2."""


class ConfigError(UserError):
    """A config that cannot work. The message names the field, its value and what is accepted."""


class CommandError(UserError):
    """A command line that a script cannot take. The message names the word and what to give."""


class TextError(UserError):
    """Text, or a file made from text, that cannot be used. The message names it and the remedy."""


class HuggingFaceError(UserError):
    """A folder that cannot be read or written. The message names the thing and the remedy."""


class LeakageError(UserError):
    """Something that no report can be made of. The message names the remedy."""


class ProcessError(UserError):
    """The processes cannot work together. The message names the process, the value, the remedy."""


class RetrievalError(UserError):
    """An embedder, an index or a search that cannot work. The message names the remedy."""


class SweepError(UserError):
    """A sweep that cannot be run. The message names the thing and the remedy."""


class InferenceError(UserError):
    """A prompt or a setting that cannot work. The message names the thing and the remedy."""


class DivergenceError(UserError):
    """The loss or the gradient is no finite number any more, or a guarded run has no try left."""


class CheckpointError(UserError):
    """A checkpoint or workdir that does not fit. The message names both sides and the remedy."""


class CompileError(UserError):
    """A program that cannot be compiled here. The message names the cause and the remedy."""


class VersionError(UserError):
    """A version that cannot be opened or made. The message names the thing and the remedy."""


class BankError(UserError):
    """A bank that cannot be read or written. The message names the thing and the remedy."""


class QuantizerError(BankError):
    """Vectors or codes that do not fit a quantizer. The message names the thing and the remedy."""


class BenchmarkError(UserError):
    """A benchmark that cannot run. The message names the remedy."""


class UsefulnessError(UserError):
    """A selection of references that cannot be made. The message names the remedy."""
