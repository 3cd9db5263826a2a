"""The checker that conftest.py applies to all annotations of m3jax."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

# PEP 484's numeric tower: an int serves where a float is asked for.
_checker = beartype(conf=BeartypeConf(is_pep484_tower=True))
_checkers: dict[tuple, Callable] = {}


def check(function: Callable) -> Callable:
    """A function without a body that checks arguments as annotated.

    jaxtyping passes one for every definition that is run, also of functions within functions, and
    making a checker takes milliseconds: equal definitions share one.
    """
    key = (function.__module__, function.__qualname__, function.__code__, *_values(function))
    try:
        return _checkers[key]
    except KeyError:
        return _checkers.setdefault(key, _checker(function))
    except TypeError:  # an annotation or default that cannot be hashed
        return _checker(function)


def _values(function: Callable) -> tuple:
    defaults = (function.__defaults__ or (), tuple((function.__kwdefaults__ or {}).items()))
    return (tuple(function.__annotations__.items()), *defaults)
