"""How launch scripts start and end: mistakes of the user end with one message, not a traceback."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from ml_collections import ConfigDict

from m3jax.errors import ConfigError, UserError

USER_ERROR = 2  # exit code


def show_error(error: BaseException) -> int:
    """Prints the message, for a defect the traceback too; returns the exit code."""
    if isinstance(error, UserError):
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    traceback.print_exception(error)
    return 1


def guarded(
    main: Callable[[list[str]], None], commands: Sequence[str] = ()
) -> Callable[[list[str]], None]:
    """`main` that ends with the message and exit code 2 on an error of the user.

    The script takes one of `commands` before its flags, or none.
    Libraries log warnings only, which keeps the progress bar whole; `--verbosity=0` shows the rest.
    """

    def run(argv: list[str]) -> None:
        if commands and (len(argv) != 2 or argv[1] not in commands):
            given = " ".join(argv[1:]) or "nothing"
            raise app.UsageError(f"give one command, of {', '.join(commands)}; found {given}")
        if not commands and len(argv) > 1:
            raise app.UsageError(f"unknown argument {argv[1]!r}; every option begins with --")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            _refuse_buckets()
            main(argv)
        except UserError as error:
            raise SystemExit(show_error(error)) from None

    return run


def _refuse_buckets() -> None:
    """A path library would turn `gs://b/x` into the local folder `gs:/b/x`."""
    for name in ("workdir", "init_from"):
        value = flags.FLAGS[name].value if name in flags.FLAGS else None
        if value and "://" in value:
            raise ConfigError(
                f"--{name}={value}: workdirs in buckets are not supported yet; mount the bucket"
                " (Cloud Storage FUSE) and name the folder"
            )


def define_process_flags() -> None:
    """Flags of scripts that can run as several processes; `processes` reads them."""
    flags.DEFINE_boolean(
        "distributed",
        False,
        "Run as one of several processes, which the cluster knows: TPU pod, Slurm, Open MPI,"
        " Kubernetes. Start the same command on every host.",
    )
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0; with --processes and --process_id."
    )
    flags.DEFINE_integer("processes", None, "Number of processes.")
    flags.DEFINE_integer("process_id", None, "Which of the processes this is, from 0.")
    flags.DEFINE_integer("join_timeout", 300, "Seconds to wait for the other processes at start.")
    flags.DEFINE_integer(
        "heartbeat_timeout",
        100,
        "Seconds without a sign of life after which a process counts as dead and the others end.",
    )


def processes(config: ConfigDict) -> contextlib.AbstractContextManager[None]:
    """Joins the other processes of `define_process_flags` while the block runs.

    Nothing may have used a device before.

    Raises:
      ProcessError: the flags do not fit together, or the processes do not meet.
    """
    from m3jax.distributed import joined
    from m3jax.watch import Processes

    given = flags.FLAGS
    found = Processes.of_flags(
        given.distributed,
        given.coordinator,
        given.processes,
        given.process_id,
        join_timeout=given.join_timeout,
        heartbeat_timeout=given.heartbeat_timeout,
    )
    return joined(found, config, show_error)


def define_cache_flag() -> None:
    """The flag of scripts that compile; `use_compilation_cache` reads it."""
    flags.DEFINE_string(
        "compilation_cache",
        None,
        "Folder where compiled programs are kept for the next start; gs://… needs gcsfs.",
    )


def use_compilation_cache() -> None:
    """Lets JAX keep and find compiled programs in the folder of the flag, if it is given.

    Raises:
      ConfigError: the folder cannot be made or written to, or is a bucket and gcsfs is missing.
    """
    folder = flags.FLAGS.compilation_cache
    if folder is None:
        return
    import jax

    if folder.startswith("gs://"):
        if importlib.util.find_spec("gcsfs") is None:
            raise ConfigError(f"--compilation_cache={folder}: pip install gcsfs, which reads gs://")
    else:
        try:
            os.makedirs(folder, exist_ok=True)
            writable = os.access(folder, os.W_OK)
        except OSError as error:
            raise ConfigError(f"--compilation_cache={folder}: {error.strerror}") from error
        if not writable:
            raise ConfigError(f"--compilation_cache={folder}: cannot be written to")
        folder = os.path.abspath(folder)
    jax.config.update("jax_compilation_cache_dir", folder)


def run(
    main: Callable[[list[str]], None], required: Sequence[str] = (), commands: Sequence[str] = ()
) -> None:
    """Runs the `main` of a launch script with absl flags.

    Args:
      main: takes the command line without flags.
      required: names of flags that must be given.
      commands: the words of which one must be given.
    """
    flags.mark_flags_as_required(list(required))
    app.run(guarded(main, commands))
