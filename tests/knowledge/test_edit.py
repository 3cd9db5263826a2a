"""Edits of a workdir's knowledge, against a workdir prepared with the edited text."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import processes
import pytest
from data.data_workdir import make_workdir, tiny_config
from memory_axes import by_reference
from tolerance import close, error

from m3jax.config import PREFIX_TOKENS
from m3jax.data.pipeline import open_pipeline
from m3jax.errors import BankError, LockError, VersionError
from m3jax.knowledge.current import read_current
from m3jax.knowledge.edit import edit, merge, refresh, rollback
from m3jax.knowledge.maintain import compact, repair, verify
from m3jax.knowledge.versions import (
    VERSIONS,
    open_bank,
    open_index,
    open_references,
    open_version,
    require_unedited,
    versions,
)
from m3jax.make_model import make_model
from m3jax.memory.bank import Bank
from m3jax.memory.document_context import writer_settings
from m3jax.memory.write import write_bank
from m3jax.retrieval.index import Index
from m3jax.retrieval.retriever import Retriever
from m3jax.text.documents import Document
from m3jax.text.references import References
from m3jax.text.tokenizer import Tokenizer
from m3jax.workdir import only_writer

ROOT = Path(__file__).parents[2]
CONFIG = tiny_config(memory__reference_length=20)
WEIGHTS: dict[int, Any] = {}


def write(
    references: References, folder: Path, base: Any, weights: int = 0, config: Any = CONFIG
) -> None:
    model = make_model(config, PREFIX_TOKENS)
    if weights not in WEIGHTS:
        WEIGHTS[weights] = jax.jit(model.init)(jax.random.key(weights))
    write_bank(
        config,
        model,
        WEIGHTS[weights],
        references,
        folder,
        progress=False,
        base=base,
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workdir(tmp_path_factory.mktemp("prepared"), CONFIG)


@pytest.fixture
def workdir(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "run"))


def opened(workdir: Path, number: int | None = None) -> tuple[Any, Any, Any]:
    """References, index and bank of a version."""
    version = open_version(workdir, number)
    references = open_references(CONFIG, version, Tokenizer.load(workdir / "tokenizer"))
    return references, open_index(version, references), open_bank(version, references)


def documents(*names: str, word: str = "otter") -> list[Document]:
    return [Document(name, f"{name} {word}", name, "made up") for name in names]


def found(workdir: Path, query: str, k: int = 3, number: int | None = None) -> list[str]:
    """Texts that a query finds."""
    references, index, _ = opened(workdir, number)
    ids = Retriever(index, references, 8, 1.0).retrieve([query], None, k)[0]
    return references.texts(ids[ids >= 0])


def test_what_is_added_is_found_and_read(workdir: Path) -> None:
    before, _, old_bank = opened(workdir)
    version = edit(CONFIG, workdir, documents=documents("Zork", "Quux"), write=write)
    assert (version.number, versions(workdir)) == (1, [0, 1])
    references, _, bank = opened(workdir)
    assert found(workdir, "Zork")[0] == "Zork otter"
    assert not any("Zork" in text for text in found(workdir, "Zork", number=0))
    assert len(references) == len(before) + 2 == bank.size
    new, old = references.find("Zork#0"), np.array([0, 5])
    assert new >= len(before)
    write(References(version.deltas[0] / "references"), workdir / "again", None)
    again = by_reference(Bank.open(workdir / "again").read(np.array([0, 1])))
    memory = by_reference(bank.read(np.array([new, -1, 5])))
    row = new - len(before)
    np.testing.assert_array_equal(memory.keys[0], again.keys[row])
    np.testing.assert_array_equal(memory.values[2], by_reference(old_bank.read(old)).values[1])
    assert memory.length[1] == 0 and not memory.keys[1].any()


def test_a_replaced_document_is_read_in_its_new_form_only(workdir: Path) -> None:
    edit(CONFIG, workdir, documents=documents("Zork"), write=write)
    first, _, _ = opened(workdir)
    old = first.find("Zork#0")
    version = edit(
        CONFIG, workdir, documents=documents("Zork", word="lynx"), replace=True, write=write
    )
    references, index, bank = opened(workdir)
    assert found(workdir, "Zork")[0] == "Zork lynx"
    assert "Zork otter" not in found(workdir, "Zork otter", k=5)
    assert version.tombstones.tolist() == [old] and references.find("Zork#0") == old + 1
    ids, _ = index.search(index.embedder.embed(["Zork otter"] * 2), len(references))
    assert (ids >= 0).sum() == 2 * (len(references) - 1) and old not in ids
    with pytest.raises(BankError, match=f"reference id {old} is not in .* an edit removed it"):
        bank.read(np.array([old]))
    with pytest.raises(IndexError, match="removed"):
        references.texts([old])
    assert found(workdir, "Zork", number=1)[0] == "Zork otter"


def test_deleting_finds_what_is_next(workdir: Path) -> None:
    """As if the deleted ones had never been there, whatever number of them is in the way."""
    references, index, _ = opened(workdir)
    query = index.embedder.embed(["pet"])
    order = [int(i) for i in index.search(query, len(references))[0][0]]
    keys = references.live_keys()
    gone = order[:20]
    edit(CONFIG, workdir, delete=[keys[i] for i in gone], write=write)
    _, edited, _ = opened(workdir)
    for k in (1, 3, 50):
        assert edited.search(query, k)[0][0].tolist() == order[20 : 20 + k]


@pytest.mark.slow
def test_a_version_equals_one_prepared_anew(workdir: Path, prepared: Path) -> None:
    references, _, _ = opened(workdir)
    document = references.live_keys()[3].rpartition("#")[0]
    edit(CONFIG, workdir, documents=documents("Zork", "Quux"), write=write)
    edit(CONFIG, workdir, delete=[document], write=write)
    edit(CONFIG, workdir, documents=documents("Quux", word="lynx"), replace=True, write=write)
    references, _, bank = opened(workdir)
    expected = {key: references[references.find(key)].text for key in references.live_keys()}
    memories = {key: bank.read(np.array(references.find(key))) for key in references.live_keys()}
    version, busy = compact(CONFIG, workdir, write=write)
    assert (version.number, versions(workdir), busy) == (4, [4], [])
    references, _, bank = opened(workdir)
    assert {
        key: references[references.find(key)].text for key in references.live_keys()
    } == expected
    for key, memory in memories.items():
        now = bank.read(np.array(references.find(key)))
        jax.tree.map(np.testing.assert_array_equal, now, memory)
    assert found(workdir, "Zork")[0] == "Zork otter"
    assert verify(CONFIG, workdir) == []
    assert not (workdir / "bank").exists() and not (workdir / "references").exists()
    assert sorted(p.name for p in (workdir / VERSIONS).iterdir() if p.is_dir()) == ["000004"]
    for number in range(4):
        with pytest.raises(VersionError, match=f"version {number} of .* was deleted"):
            open_version(workdir, number)
    assert edit(CONFIG, workdir, documents=documents("Next"), write=write).number == 5


def test_nothing_of_a_deleted_reference_is_left_after_compaction(workdir: Path) -> None:
    """Not in a file, as its tokens, its memory or its embedding."""
    references, index, bank = opened(workdir)
    everything = by_reference(bank.read(np.arange(bank.size))).keys
    alike = (everything[:, None] == everything[None]).all(axis=(2, 3, 4, 5)).sum(axis=0)
    gone = int(np.flatnonzero(alike == 1)[3])  # kept tokens may stand in others, too
    key = references[gone].key
    tokens = references.tokens([gone])[0, : references.lengths[gone]]
    memory = bank.read(np.array([gone]))
    traces = [
        tokens.astype(references.dtype).tobytes(),
        memory.keys.tobytes(),
        index.embedder.embed(references.texts([gone]))[0].tobytes(),
    ]

    def places(trace: bytes) -> list[Path]:
        files = (path for path in workdir.rglob("*") if path.is_file())
        return [p for p in files if "corpus" not in p.parts and trace in p.read_bytes()]

    del references, index, bank
    assert all(places(trace) for trace in traces)
    edit(CONFIG, workdir, delete=[key], write=write)
    compact(CONFIG, workdir, write=write)
    assert [places(trace) for trace in traces] == [[], [], []]


@pytest.mark.slow
def test_an_edit_follows_a_bank_with_context(workdir: Path) -> None:
    """Added documents are encoded with their context, and what is deleted leaves the others."""
    two_layers = tiny_config(memory__reference_length=20, memory__layers=2)

    def in_context(references: References, folder: Path, base: Any, context: str = "") -> None:
        config = two_layers.copy_and_resolve_references()
        layout = {"context": context} if context else base.binding.layout
        config.writer.update(writer_settings({"reference_length": 20} | layout))
        write(references, folder, base, 2, config)

    long = Document("Long", "\n".join(f"{name} " * 15 for name in ("otter", "lynx", "ibis")))
    shutil.rmtree(workdir / "bank")
    first = References(workdir / "references")
    with_context = two_layers.copy_and_resolve_references()
    with_context.writer.document_context = True
    with_context.writer.document_context_tokens = 60
    write(first, workdir / "bank", None, 2, with_context)
    version = edit(CONFIG, workdir, documents=[long], write=in_context)
    added = References(version.deltas[0] / "references")
    assert len(added) > 2
    in_context(added, workdir / "alone", None, context="reference")
    alone = by_reference(Bank.open(workdir / "alone").read(np.arange(2))).values
    references, _, bank = opened(workdir)
    keys = [f"Long#{n}" for n in range(2)]
    before = by_reference(bank.read(np.array([references.find(key) for key in keys]))).values
    close(before[0], alone[0])
    assert error(before[1], alone[1]) > 1e-3

    edit(CONFIG, workdir, delete=["Long#0"], write=in_context)
    references, _, bank = opened(workdir)
    after = bank.read(np.array(references.find("Long#1"))).values
    np.testing.assert_array_equal(after, before[1])
    # Collection leaves nothing of what was deleted, in the memories behind it either.
    compact(CONFIG, workdir, write=in_context)
    references, _, bank = opened(workdir)
    after = bank.read(np.array(references.find("Long#1"))).values
    close(after, alone[1])
    assert bank.binding.layout["document_context_references"] == 3


def test_an_edit_costs_what_its_document_costs(workdir: Path) -> None:
    """Not the base's table of words, nor descriptors and maps that an open version holds."""
    base = {path.name: path.stat().st_size for path in (workdir / "index").rglob("*")}
    assert base["document_frequency.npy"] > 1 << 22
    files = lambda: len(os.listdir("/dev/fd"))  # noqa: E731
    held = []
    for name in ("Zork", "Quux", "Xyzzy"):
        version = edit(CONFIG, workdir, documents=documents(name), write=write)
        version.close()
        folder = version.deltas[-1]
        assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 1 << 18
        before = files()
        version = open_version(workdir)
        references = open_references(CONFIG, version, Tokenizer.load(workdir / "tokenizer"))
        index, bank = open_index(version, references), open_bank(version, references)
        ids = references.live[-1:]
        assert name in references.texts(ids)[0]
        bank.read(ids)
        held.append(files() - before)
        assert all(part.embedder is index.embedder for part in index.indices)
        del references, index, bank
        version.close()
    assert held == [1, 1, 1]
    # One embedder, whether it was extended edit by edit or read from what the edits left.
    texts = [document.text for document in documents("Zork", "Quux", "Xyzzy")]
    whole = Index.open(workdir / "index").embedder.extended(texts)
    assert opened(workdir)[1].embedder.fingerprint == whole.fingerprint


def test_rollback_and_forward(workdir: Path) -> None:
    edit(CONFIG, workdir, documents=documents("Zork"), write=write)
    rollback(workdir, 0)
    assert not any("Zork" in text for text in found(workdir, "Zork"))
    assert edit(CONFIG, workdir, documents=documents("Quux"), write=write).number == 2
    assert not any("Zork" in text for text in found(workdir, "Zork"))
    rollback(workdir, 1)
    assert found(workdir, "Zork")[0] == "Zork otter"
    with pytest.raises(VersionError, match="no version 9; there are 0, 1, 2"):
        rollback(workdir, 9)


@pytest.mark.slow
def test_merge_copies_the_memories_of_the_other(workdir: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(workdir, tmp_path / "other"))
    edit(CONFIG, other, documents=documents("Zork"), write=write)
    edit(CONFIG, workdir, documents=documents("Quux"), write=write)
    with pytest.raises(VersionError, match="documents are in both"):
        merge(CONFIG, workdir, other, write=write)

    def copied(references: References, folder: Path, base: Any) -> None:
        write(references, folder, base, weights=1)  # of no use: its fingerprint differs

    with pytest.raises(BankError, match="written by other weights"):
        merge(CONFIG, workdir, other, write=copied, replace=True)
    merge(CONFIG, workdir, other, write=write, replace=True)
    assert found(workdir, "Zork")[0] == "Zork otter"
    assert found(workdir, "Quux")[0] == "Quux otter"
    references, _, bank = opened(workdir)
    theirs, _, their_bank = opened(other)
    ours = bank.read(np.array([references.find("Zork#0")]))
    expected = their_bank.read(np.array([theirs.find("Zork#0")]))
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
    assert len(references.live_keys()) == len(theirs.live_keys()) + 1


def test_banks_stored_differently_are_not_merged(workdir: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(workdir, tmp_path / "other"))
    manifest = json.loads((other / "bank" / "manifest.json").read_text())
    shutil.rmtree(other / "bank")
    with CONFIG.unlocked():
        CONFIG.writer.compression = "int8"
    try:
        write(References(other / "references"), other / "bank", None)
    finally:
        CONFIG.writer.compression = manifest["codec"]
    with pytest.raises(BankError, match=r"is stored with 'int8' .* \('none'\)"):
        merge(CONFIG, workdir, other, write=write, replace=True)
    assert versions(workdir) == [0]


def test_a_pipeline_reads_the_version_it_was_opened_with(workdir: Path) -> None:
    pipeline = open_pipeline(CONFIG, workdir)
    batch = pipeline.batch(0)
    edit(CONFIG, workdir, delete=[pipeline.references.live_keys()[0]], write=write)
    again = pipeline.batch(0)
    jax.tree.map(np.testing.assert_array_equal, batch, again)
    newer = open_pipeline(CONFIG, workdir)
    assert newer.version.number == 1 and pipeline.version.number == 0
    assert newer.batch(0).memory.keys.shape == batch.memory.keys.shape
    assert 0 not in newer.batch(0).reference_ids


def test_verify_names_damage_and_repair_mends_it(workdir: Path) -> None:
    edit(CONFIG, workdir, documents=documents("Zork"), write=write)
    assert verify(CONFIG, workdir) == []
    layer = open_version(workdir).deltas[0]
    shard = next(path for path in (layer / "bank").rglob("c/**/0") if path.is_file())
    kept = shard.read_bytes()
    for file in (shard, next((workdir / "index").rglob("embeddings-*"))):
        data = bytearray(file.read_bytes())
        data[len(data) // 3] ^= 1
        file.write_bytes(data)
    problems = verify(CONFIG, workdir)
    assert len(problems) == 2
    assert "embeddings" in problems[0] and "checksum differs" in problems[1]
    assert len(repair(CONFIG, workdir, write=write)) == 2
    assert verify(CONFIG, workdir) == [] and shard.read_bytes() == kept
    table = layer / "references" / "tokens.bin"
    table.write_bytes(bytes([table.read_bytes()[0] ^ 1]) + table.read_bytes()[1:])
    with pytest.raises(ValueError, match="tokens.bin"):
        repair(CONFIG, workdir, write=write)


def test_a_mistyped_workdir_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(VersionError, match="there is no workdir .*nowhere; make it with"):
        edit(CONFIG, tmp_path / "nowhere", delete=["a"], write=write)
    assert not (tmp_path / "nowhere").exists()


def test_what_cannot_be_edited_is_refused(workdir: Path) -> None:
    references, _, _ = opened(workdir)
    there = references.live_keys()[0].rpartition("#")[0]
    with pytest.raises(VersionError, match="nothing to edit"):
        edit(CONFIG, workdir, write=write)
    with pytest.raises(VersionError, match=f"document '{there}' is in .*replace"):
        edit(CONFIG, workdir, documents=documents(there), write=write)
    with pytest.raises(VersionError, match="no reference in use has the key 'nobody#0'"):
        edit(CONFIG, workdir, delete=["nobody#0"], write=write)
    with only_writer(workdir), pytest.raises(LockError, match="another process"):
        edit(CONFIG, workdir, delete=[there], write=write)
    with pytest.raises(BankError, match="written by other weights"):
        edit(
            CONFIG,
            workdir,
            documents=documents("Zork"),
            write=lambda references, folder, base: write(references, folder, base, weights=1),
        )
    assert versions(workdir) == [0] and verify(CONFIG, workdir) == []
    edit(CONFIG, workdir, delete=[there], write=write)
    with pytest.raises(VersionError, match="was edited"):
        require_unedited(workdir)
    with pytest.raises(VersionError, match="no reference in use"):
        edit(CONFIG, workdir, delete=[there], write=write)
    everyone = list(dict.fromkeys(key.rpartition("#")[0] for key in opened(workdir)[0].live_keys()))
    edit(CONFIG, workdir, delete=everyone, write=write)
    with pytest.raises(VersionError, match="nothing is left"):
        compact(CONFIG, workdir, write=write)
    rollback(workdir, 1)
    file = workdir / VERSIONS / "000002" / "tombstones.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(VersionError, match="tombstones.npy is damaged.*rollback --to=1"):
        rollback(workdir, 2)
    (workdir / VERSIONS / "current.json").write_text("{")
    with pytest.raises(VersionError, match="rollback --to=VERSION"):
        open_version(workdir)
    assert rollback(workdir, 1).number == 1 and read_current(workdir)["version"] == 1


def test_a_lost_or_foreign_pointer_to_the_current_version_is_refused(
    workdir: Path, tmp_path: Path
) -> None:
    """Deleted facts do not come back."""
    pointer = workdir / VERSIONS / "current.json"
    other = Path(shutil.copytree(workdir, tmp_path / "other"))
    keys = opened(workdir)[0].live_keys()
    edit(CONFIG, workdir, delete=keys[:1], write=write)
    intact = pointer.read_bytes()
    pointer.unlink()
    for read in (open_version, versions, require_unedited):
        with pytest.raises(VersionError, match=r"current\.json is missing, but .* rollback --to="):
            read(workdir)
    assert rollback(workdir, 1).number == 1 and pointer.read_bytes() == intact
    edit(CONFIG, other, delete=keys[:2], write=write)
    pointer.write_bytes((other / VERSIONS / "current.json").read_bytes())
    with pytest.raises(VersionError, match=r"current\.json belongs to another workdir; restore"):
        open_version(workdir)


def start(*arguments: Any) -> Any:
    """This file as a process of its own."""
    return processes.start(["python", __file__, *arguments], devices=1, stdin=subprocess.PIPE)


@pytest.mark.slow
def test_a_version_that_another_process_reads_is_kept(workdir: Path) -> None:
    reader = start("read", workdir)
    assert reader.stdout.readline() == "0\n"
    edit(CONFIG, workdir, documents=documents("Zork"), write=write)
    version, busy = compact(CONFIG, workdir, write=write)
    assert busy == [str(workdir)] and (workdir / "bank").exists()
    assert not (workdir / VERSIONS / "000001").exists()
    reader.communicate("\n")
    assert reader.returncode == 0
    again, busy = compact(CONFIG, workdir, write=write)
    assert again.number == version.number and busy == [] and not (workdir / "bank").exists()


def _loop(workdir: Path, seed: int) -> None:
    """Edits at random for ever; acknowledges each version in a file."""
    chosen = random.Random(seed)
    while True:
        references, _, _ = opened(workdir)
        name = f"N{chosen.randrange(30)}"
        there = references.lookup(f"{name}#0") is not None
        kind = chosen.choice(["edit", "edit", "delete", "refresh", "compact"])
        if kind == "delete" and there:
            edit(CONFIG, workdir, delete=[name], write=write)
        elif kind == "compact":
            compact(CONFIG, workdir, write=write)
        elif kind == "refresh":
            what = str(chosen.random())
            refresh(workdir, what, write=lambda r, folder, _: write(r, folder, None), note=what)
        else:
            word = chosen.choice(["otter", "lynx"])
            edit(CONFIG, workdir, documents=documents(name, word=word), replace=there, write=write)
        print(read_current(workdir)["version"], flush=True)


@pytest.mark.slow
def test_eight_kills(workdir: Path) -> None:
    """Whenever an editor dies, readers open a whole version, no older than the acknowledged."""
    moments = random.Random(3)
    last, kills = 0, 0
    while kills < 8:
        process = start("edit", workdir, kills)
        last = max(last, int(process.stdout.readline()))  # its compilation is behind it
        for _ in range(2):
            time.sleep(moments.uniform(0, 0.2))
            process.send_signal(signal.SIGSTOP)
            number = read_current(workdir)["version"]
            references, index, bank = opened(workdir, number)  # in the midst of an edit
            assert len(references) == index.size == bank.size
            assert verify(CONFIG, workdir, number) == []
            process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGKILL)
        acknowledged = [int(line) for line in process.communicate()[0].split()]
        last, kills = max([last, *acknowledged]), kills + 1
        number = read_current(workdir)["version"]
        assert number >= last
        assert verify(CONFIG, workdir) == []
    assert last > 3
    assert json.loads((workdir / VERSIONS / "current.json").read_text())["version"] >= last


def _read(workdir: Path) -> None:
    """Holds the current version until a line is entered."""
    version = open_version(workdir)
    print(version.number, flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    if sys.argv[1] == "read":
        _read(Path(sys.argv[2]))
    else:
        _loop(Path(sys.argv[2]), int(sys.argv[3]))
