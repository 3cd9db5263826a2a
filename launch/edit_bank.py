"""Adds, replaces and deletes references of a prepared workdir; nothing is trained.

    python launch/edit_bank.py add      --config=… --workdir=runs/wiki --documents=new.jsonl
    python launch/edit_bank.py replace  --config=… --workdir=runs/wiki --documents=changed.jsonl
    python launch/edit_bank.py delete   --config=… --workdir=runs/wiki --keys=12#0,Paris
    python launch/edit_bank.py merge    --config=… --workdir=runs/wiki --other=runs/more
    python launch/edit_bank.py list     --config=… --workdir=runs/wiki
    python launch/edit_bank.py rollback --config=… --workdir=runs/wiki --to=0
    python launch/edit_bank.py compact  --config=… --workdir=runs/wiki
    python launch/edit_bank.py verify   --config=… --workdir=runs/wiki
    python launch/edit_bank.py repair   --config=… --workdir=runs/wiki

Each of the first three and merge makes a version: references, index and bank together, or nothing
where it is stopped. Older versions stay readable until compact, which writes what is in use as a
whole and deletes all others; after that nothing that was deleted can be read. A key names a
reference (DOCUMENT#N) or all references of a document. Memories are written by the writer of the
bank.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from m3jax import cli

COMMANDS = ("add", "replace", "delete", "merge", "list", "rollback", "compact", "verify", "repair")

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, for example configs/….py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, made by launch/prepare.py.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Whose writer writes: stage folder; default that of the bank."
)
_DOCUMENTS = flags.DEFINE_string(
    "documents", None, "add, replace: documents as launch/prepare.py reads them."
)
_KEYS = flags.DEFINE_list("keys", [], "delete: keys of references (ID#N) or ids of documents.")
_OTHER = flags.DEFINE_string("other", None, "merge: workdir whose knowledge is added.")
_REPLACE = flags.DEFINE_bool("replace", False, "merge: documents in both are those of --other.")
_TO = flags.DEFINE_integer("to", None, "rollback: the version to go back to.")
_VERSION = flags.DEFINE_integer("bank_version", None, "verify, repair: which; default the current.")
_NOTE = flags.DEFINE_string("note", "", "Kept with the version.")
cli.define_cache_flag()
flags.adopt_module_key_flags(cli)  # --help shows them


def main(argv: list[str]) -> None:
    """Runs the command."""
    command = argv[1]
    _check_flags(command)
    cli.use_compilation_cache()
    from m3jax.config import validate
    from m3jax.knowledge import edit, maintain
    from m3jax.knowledge import versions as knowledge
    from m3jax.text.documents import read_documents

    config, workdir, note = validate(_CONFIG.value), Path(str(_WORKDIR.value)), _NOTE.value
    if command in ("add", "replace"):
        documents = read_documents(str(_DOCUMENTS.value))
        _say(
            edit.edit(
                config,
                workdir,
                documents=documents,
                replace=command == "replace",
                write=_writer(),
                note=note,
            )
        )
    elif command == "delete":
        _say(edit.edit(config, workdir, delete=_KEYS.value or [], write=_writer(), note=note))
    elif command == "merge":
        replace = bool(_REPLACE.value)
        _say(edit.merge(config, workdir, str(_OTHER.value), write=_writer(), replace=replace))
    elif command == "rollback":
        _say(edit.rollback(workdir, int(_TO.value or 0)))
    elif command == "compact":
        version, busy = maintain.compact(config, workdir, write=_writer(), note=note)
        _say(version)
        for folder in busy:
            print(f"{folder} is being read by another process; compact again when it has ended")
    elif command == "list":
        current = knowledge.read_current(workdir)["version"]
        for number in knowledge.versions(workdir):
            version = knowledge.open_version(workdir, number)
            mark = "*" if number == current else " "
            print(f"{mark} {number:6d}  from {version.parent:4d}  {version.note}")
    else:
        _check(command, config, workdir)


def _check(command: str, config: Any, workdir: Path) -> None:
    """verify and repair."""
    from m3jax.knowledge import maintain

    number = _VERSION.value
    if command == "repair":
        for problem in maintain.repair(config, workdir, write=_writer(), number=number):
            print(f"rewritten: {problem}")
    problems = maintain.verify(config, workdir, number)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise SystemExit(1)
    print(f"{workdir}: every file is as it was written")


def _say(version: Any) -> None:
    print(f"{version.workdir}: version {version.number} is current ({version.note})")


def _writer() -> Any:
    from m3jax.knowledge.memory_writer import MemoryWriter

    workdir = str(_WORKDIR.value)
    return MemoryWriter(_CONFIG.value, workdir, _CHECKPOINT.value, like_base=True)


def _check_flags(command: str) -> None:
    needs = {
        "add": ("documents", _DOCUMENTS.value),
        "replace": ("documents", _DOCUMENTS.value),
        "delete": ("keys", _KEYS.value),
        "merge": ("other", _OTHER.value),
        "rollback": ("to", _TO.value is not None),
    }
    if command == "collect":
        raise app.UsageError("the command collect is called compact: launch/edit_bank.py compact")
    name, given = needs.get(command, ("", True))
    if not given:
        raise app.UsageError(f"{command} needs --{name}")


if __name__ == "__main__":
    cli.run(main, required=["config", "workdir"], commands=(*COMMANDS, "collect"))
