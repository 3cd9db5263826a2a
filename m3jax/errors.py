"""Errors that a user can act on: each message names the value at fault and the remedy."""

from __future__ import annotations


class UserError(ValueError):
    """Base class; launch scripts print its message without a traceback and exit with code 2."""


class ConfigError(UserError):
    """Raised for an invalid config; the message names the field, its value and accepted values."""


class CommandError(UserError):
    """Raised for an invalid command line; the message names the argument and the correct form."""


class MachineError(UserError):
    """Raised for what the machine refuses: a full disk, a permission, a platform it has not."""


class TextError(UserError):
    """Raised for text, or for a file made from text, that is missing, damaged or unusable."""


class HuggingFaceError(UserError):
    """Raised for a Hugging Face model folder that cannot be read or written."""


class LeakageError(UserError):
    """Raised for settings or texts from which no leakage report can be made."""


class LockError(UserError):
    """Raised if another process is writing the same folder; the message names both."""


class ProcessError(UserError):
    """Raised if several processes cannot work together; the message names the process and value."""


class RetrievalError(UserError):
    """Raised for an embedder, an index or a search that cannot work."""


class SweepError(UserError):
    """Raised for a sweep that cannot be run."""


class InferenceError(UserError):
    """Raised for a prompt or a setting with which inference or its evaluation cannot work."""


class DivergenceError(UserError):
    """Raised if loss or gradient is not finite, or a guarded run has used up its rollbacks."""


class CheckpointError(UserError):
    """Raised for a checkpoint or workdir that does not fit; the message names both values."""


class CompileError(UserError):
    """Raised for a program that cannot be compiled on this machine."""


class StoreError(UserError):
    """Raised for a folder or bucket that cannot be reached, or whose objects are damaged."""


class VersionError(UserError):
    """Raised for a version of the knowledge that cannot be opened or made."""


class BankError(UserError):
    """Raised for a bank of memories that cannot be read or written."""


class QuantizerError(BankError):
    """Raised for vectors, codes or codebooks that do not fit the vector quantizer."""


class BenchmarkError(UserError):
    """Raised for a benchmark that cannot run."""


class UsefulnessError(UserError):
    """Raised for a selection of useful references that cannot be made."""
