"""Imports of optional libraries, with an error that tells how to install them."""

from __future__ import annotations

import importlib
from typing import Any

from m3jax.errors import TextError


def optional(module: str, need: str, install: str = "-e '.[clean]'") -> Any:
    """Imports a module; raises `TextError` with `need` and the pip command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TextError(f"{need}: pip install {install}") from error
