"""How launch scripts start and end: mistakes of the user end with one message, not a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

USER_ERROR = 2  # exit code


def is_user_error(error: BaseException) -> bool:
    """Whether the message says all: an error class of m3jax, which names the thing and the remedy.

    Plain `ValueError`s of libraries are not: they may be defects, and keep their traceback.
    """
    return isinstance(error, ValueError) and type(error).__module__.split(".")[0] == "m3jax"


def guarded(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """`main` that ends with the message and exit code 2 on an error of the user.

    Libraries log warnings only, which keeps the progress bar whole; `--verbosity=0` shows the rest.
    """

    def run(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unknown argument {argv[1]!r}; every option begins with --")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            main(argv)
        except ValueError as error:
            if not is_user_error(error):
                raise
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            raise SystemExit(USER_ERROR) from None

    return run


def run(main: Callable[[list[str]], None], required: Sequence[str] = ()) -> None:
    """Runs the `main` of a launch script with absl flags.

    Args:
      main: takes the command line without flags.
      required: names of flags that must be given.
    """
    flags.mark_flags_as_required(list(required))
    app.run(guarded(main))
