"""The checker that conftest.py applies to all annotations of m3jax."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

# PEP 484's numeric tower: an int serves where a float is asked for.
_make = beartype(conf=BeartypeConf(is_pep484_tower=True))
_made: dict[tuple, Callable] = {}


def check(function: Callable) -> Callable:
    """A function that checks its arguments as annotated; the body of `function` is empty.

    jaxtyping passes one for every definition that is run, also of functions within functions.
    Making a checker takes milliseconds: it is made at the first call, and once for all functions
    that one definition has made.
    """
    checker: Callable | None = None

    def checked(*arguments: Any, **named: Any) -> Any:
        nonlocal checker
        if checker is None:
            checker = _checker(function)
        return checker(*arguments, **named)

    return checked


def _checker(function: Callable) -> Callable:
    key = (
        *(function.__module__, function.__qualname__, function.__code__),
        tuple(function.__annotations__.items()),
    )
    try:
        if key not in _made:
            _made[key] = _make(function)
        return _made[key]
    except TypeError:  # an annotation that cannot be hashed
        return _make(function)
