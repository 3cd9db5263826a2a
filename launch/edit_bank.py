"""Adds, replaces and deletes references of a prepared workdir; nothing is trained.

    python launch/edit_bank.py add      --config=… --workdir=runs/wiki --documents=new.jsonl
    python launch/edit_bank.py replace  --config=… --workdir=runs/wiki --documents=changed.jsonl
    python launch/edit_bank.py delete   --config=… --workdir=runs/wiki --keys=12#0,Paris
    python launch/edit_bank.py merge    --config=… --workdir=runs/wiki --other=runs/copy --replace
    python launch/edit_bank.py list     --config=… --workdir=runs/wiki
    python launch/edit_bank.py rollback --config=… --workdir=runs/wiki --to=0
    python launch/edit_bank.py compact  --config=… --workdir=runs/wiki
    python launch/edit_bank.py verify   --config=… --workdir=runs/wiki
    python launch/edit_bank.py repair   --config=… --workdir=runs/wiki

add, replace, delete and merge make a version: references, index and bank together, or nothing where
they are stopped. Older versions stay readable until compact; after that nothing that was deleted
can be read. merge brings back what was edited in a copy of the workdir (cp -r). A key names a
reference (DOCUMENT#N) or all references of a document. Memories are written by the writer of the
bank.

A workdir in a bucket (gs://…) is edited from any machine, by one at a time; a reader there sees a
version whole or not at all.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from absl.flags import FlagValues

from m3jax import cli, places
from m3jax.cli import Flag, switch, words
from m3jax.printable import complain, one_line, with_originals

COMMANDS = cli.Commands()
_WRITER = cli.CHECKPOINT.with_help("Its writer writes; default the writer of the bank.")
_WRITE = (*cli.BUCKET_RUN, _WRITER, cli.CACHE)
_NOTE = Flag("note", "Text that is kept with the version.", default="")
_DOCUMENTS = Flag(
    "documents", "Documents as launch/prepare.py reads them.", places.TEXTS, required=True
)


@COMMANDS.add(*_WRITE, _DOCUMENTS, _NOTE)
def add(given: FlagValues) -> None:
    """Adds the references of new documents."""
    _add(given, replace=False)


@COMMANDS.add(*_WRITE, _DOCUMENTS, _NOTE)
def replace(given: FlagValues) -> None:
    """Replaces documents: their old references go, the new ones come."""
    _add(given, replace=True)


def _add(given: FlagValues, replace: bool) -> None:
    from m3jax.knowledge.edit import edit
    from m3jax.text.documents import describe_unread, read_documents

    unread = Counter[str]()
    documents = list(read_documents(given.documents, unread))
    told = describe_unread(given.documents, unread)
    if told:
        print(f"{len(documents)} documents read; not read: {told}")
    at = given.config, _workdir(given)
    _say(edit(*at, documents=documents, replace=replace, write=_writer(given), note=given.note))


@COMMANDS.add(
    *_WRITE,
    words("keys", "Keys of references (ID#N) or ids of documents.", [], required=True),
    _NOTE,
)
def delete(given: FlagValues) -> None:
    """Deletes references by key, or all of a document."""
    from m3jax.knowledge.edit import edit

    at = given.config, _workdir(given)
    _say(edit(*at, delete=given.keys, write=_writer(given), note=given.note))


@COMMANDS.add(
    *_WRITE,
    Flag("other", "Workdir whose knowledge is added.", places.ANY_WORKDIR, required=True),
    switch("replace", "Documents in both are taken from --other."),
)
def merge(given: FlagValues) -> None:
    """Adds the knowledge of another workdir."""
    from m3jax.knowledge.edit import merge
    from m3jax.mirror import Mirror

    at = given.config, _workdir(given), Mirror(given.other, given.cache_dir).local
    _say(merge(*at, write=_writer(given), replace=given.replace))


@COMMANDS.add(*cli.BUCKET_RUN, Flag("to", "Version to go back to.", int, required=True))
def rollback(given: FlagValues) -> None:
    """Makes an older version the current one again."""
    from m3jax.knowledge.edit import rollback

    _say(rollback(_workdir(given), given.to))


@COMMANDS.add(*_WRITE, _NOTE)
def compact(given: FlagValues) -> None:
    """Writes what is in use as a whole and deletes everything else."""
    from m3jax.knowledge.maintain import compact

    version, busy = compact(given.config, _workdir(given), write=_writer(given), note=given.note)
    _say(version)
    for folder in busy:
        print(f"{folder} is being read by another process; compact again when it has ended")


@COMMANDS.add(*cli.BUCKET_RUN, name="list")
def list_versions(given: FlagValues) -> None:
    """Lists the versions; a star marks the current one."""
    from m3jax.knowledge import versions

    workdir = versions.existing(_workdir(given))
    current = versions.open_version(workdir, parts=False).number
    for number in versions.versions(workdir):
        version = versions.read_version(workdir, number)
        mark = "*" if number == current else " "
        print(f"{mark} {number:6d}  from {version.parent:4d}  {one_line(version.note)}")


@COMMANDS.add(*cli.BUCKET_RUN, cli.BANK_VERSION)
def verify(given: FlagValues) -> None:
    """Checks every file of a version; exit code 1 where one is not as it was written."""
    from m3jax.knowledge import maintain

    problems = maintain.verify(given.config, _workdir(given), given.bank_version)
    for problem in problems:
        complain(with_originals(problem))
    if problems:
        raise SystemExit(1)
    print(f"{given.workdir}: every file is as it was written")


@COMMANDS.add(*_WRITE, cli.BANK_VERSION)
def repair(given: FlagValues) -> None:
    """Writes damaged memories and index files anew, then verifies."""
    from m3jax.knowledge import maintain

    at = given.config, _workdir(given)
    for problem in maintain.repair(*at, write=_writer(given), number=given.bank_version):
        print(f"rewritten: {with_originals(problem)}")
    verify(given)


def _workdir(given: FlagValues) -> Path:
    """Returns the workdir, or the mirror of one in a bucket."""
    from m3jax.mirror import Mirror

    return Mirror(given.workdir, given.cache_dir).local


def _say(version: Any) -> None:
    from m3jax.mirror import Mirror

    place = Mirror.of(version.workdir).place
    print(f"{place}: version {version.number} is current ({version.note})")


def _writer(given: FlagValues) -> Any:
    from m3jax.knowledge.memory_writer import MemoryWriter

    return MemoryWriter(given.config, _workdir(given), given.checkpoint, like_base=True)


if __name__ == "__main__":
    cli.run(__doc__, COMMANDS)
