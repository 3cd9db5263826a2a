"""Memories with their document's context: what reaches a memory, and what does not."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory.memory_tiny import TinyReferences, build, shard_files, tiny_config, tiny_params
from memory_axes import by_reference
from ml_collections import ConfigDict
from model.oracle import Oracle
from tolerance import close, error

from m3jax.errors import BankError
from m3jax.memory import encode
from m3jax.memory.bank import Bank
from m3jax.memory.binding import layout_of
from m3jax.memory.document_context import identities, packed_rows, writer_settings
from m3jax.memory.storage import shard_key
from m3jax.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("compile_once")

# Rows of 3 references. Documents of all lengths around a window, shorter ones and one much longer.
SIZES = (1, 2, 3, 4, 5, 1, 8, 1, 1, 2, 7, 2)
COUNT = sum(SIZES)
LEADS = np.cumsum((0, *SIZES[:-1]))
ALL = np.arange(COUNT)


def context_config(**changes: Any) -> ConfigDict:
    return tiny_config(
        **{
            "writer__document_context": True,
            "writer__document_context_tokens": 3 * 12 + 5,
            **changes,
        }
    )


def in_documents(seed: int = 0) -> TinyReferences:
    return TinyReferences(COUNT, seed, sizes=SIZES)


def window_of(reference: int) -> list[int]:
    """What a reference's memory comes from, itself last: as the documentation says, literally."""
    lead = int(LEADS[np.searchsorted(LEADS, reference, "right") - 1])
    window = [lead]
    for other in range(lead + 1, reference + 1):
        window = [lead, other] if len(window) == 3 else [*window, other]
    return window


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank with context that no test changes."""
    folder = tmp_path_factory.mktemp("context") / "bank"
    assert build(folder, context_config(), references=in_documents())["encoded"] == COUNT
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """The same references, each encoded alone."""
    folder = tmp_path_factory.mktemp("alone") / "bank"
    build(folder, tiny_config(), references=in_documents())
    return Bank.open(folder)


class _WholeWindow(Oracle):
    """Encodes a window as one text and keeps of it what its last reference would keep of itself."""

    def write_last(self, parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values (L, K, P, H); keys turned back from their place in the window."""
        memory, p, own = self.config.memory, len(self.prefix), len(parts[-1])
        text = [int(token) for part in parts for token in part]
        before, P = len(text) - own, min(memory.kept_tokens, own)
        shape = (memory.layers, self.config.model.kv_heads, memory.kept_tokens)
        keys, values = np.zeros((2, *shape, self.config.model.head_dim))
        stream = [self.embed(token) for token in (*self.prefix, *text)]
        for number, layer in enumerate(self.layers):
            self.enter(number)
            projected = [self.project(layer, x) for x in stream]
            rotated = [
                np.stack([self.rope(head, i) for head in k])
                for i, (_, k, _) in enumerate(projected)
            ]
            if number in self.memory_layers:
                row, mine = number - memory.first_layer, projected[p + before :]
                w = self.weights(np.stack([q for q, *_ in mine]), np.stack([k for _, k, _ in mine]))
                for head in range(shape[1]):
                    for slot, j in enumerate(sorted(np.argsort(-w[head], kind="stable")[:P])):
                        moved = self.rope(rotated[p + before + j][head], -before)
                        keys[row, head, slot] = moved
                        values[row, head, slot] = mine[j][2][head]
            stream = self._causal(layer, stream, projected, rotated, lambda i: [])
        return keys, values


@pytest.mark.parametrize("no_rope_every", [0, 2])
def test_a_memory_is_that_of_the_whole_window_in_one_text(
    folder: Path, tmp_path: Path, no_rope_every: int
) -> None:
    config, references = context_config(model__no_rope_every=no_rope_every), in_documents()
    if no_rope_every:
        folder = tmp_path / "bank"
        build(folder, config, references=references)
    oracle, bank = _WholeWindow(config, tiny_params(config)), Bank.open(folder)
    asked = [0, 2, 5, 8, 9, 14, 20, 22, 34]  # alone, within a window, first and last of a later one
    assert {len(window_of(i)) for i in asked} == {1, 2, 3}
    assert window_of(14) == [10, 13, 14] and window_of(20) == [16, 19, 20]
    found = by_reference(bank.read(np.array(asked)))
    for row, reference in enumerate(asked):
        parts = [references.table[i, : references.lengths[i]] for i in window_of(reference)]
        keys, values = oracle.write_last(parts)
        close(found.keys[row], keys)
        close(found.values[row], values)


def test_without_text_before_it_a_memory_is_that_of_the_reference_alone(
    folder: Path, alone: Bank
) -> None:
    found, isolated = by_reference(Bank.open(folder).read(ALL)), by_reference(alone.read(ALL))
    close(found.keys[LEADS], isolated.keys[LEADS])
    close(found.values[LEADS], isolated.values[LEADS])
    np.testing.assert_array_equal(found.length, isolated.length)
    later = np.setdiff1d(ALL, LEADS)
    differ = np.abs(found.values - isolated.values)[later].max(axis=(1, 2, 3, 4))
    assert (differ > 1e-3).all()


@pytest.mark.parametrize("changed", [6, 7, 11, 17])
def test_only_the_text_before_it_in_its_window_reaches_a_memory(
    folder: Path, tmp_path: Path, changed: int
) -> None:
    references = in_documents()
    length = references.lengths[changed]
    references.table[changed, :length] = 60 + np.arange(length)
    build(tmp_path / "bank", context_config(), references=references)
    ours, theirs = (by_reference(Bank.open(f).read(ALL)) for f in (tmp_path / "bank", folder))
    differ = (ours.values != theirs.values).any(axis=(1, 2, 3, 4))
    differ |= (ours.keys != theirs.keys).any(axis=(1, 2, 3, 4))
    reached = [changed in window_of(i) for i in ALL]
    np.testing.assert_array_equal(differ, reached)
    assert sum(reached) > 1


def test_shards_that_are_missing_come_back_the_same(folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert window_of(20)[1] < 20  # shard 2 begins within a document, within a window
    for shard in (1, 3):
        (own / shard_key(shard)).unlink()
    report = build(own, context_config(), references=in_documents())
    assert (report["encoded"], report["kept"]) == (17, 20)
    assert shard_files(own) == shard_files(folder)
    # As after a kill: what is written is a part, and the batches of the rest begin elsewhere.
    for name in ("COMPLETE", shard_key(0), shard_key(2)):
        (own / name).unlink()
    assert build(own, context_config(), references=in_documents())["encoded"] == 20
    assert shard_files(own) == shard_files(folder)


@pytest.mark.slow
def test_on_a_mesh(folder: Path, tmp_path: Path) -> None:
    config = context_config(writer__batch_references=24)
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 2, 2, 2
    build(tmp_path / "bank", config, mesh=make_mesh(config), references=in_documents())
    ours, theirs = Bank.open(tmp_path / "bank"), Bank.open(folder)
    assert ours.binding == theirs.binding
    close(ours.read(ALL).keys, theirs.read(ALL).keys)
    config.writer.batch_references = 18
    with pytest.raises(BankError, match="18, in rows of 3 references, .*use a multiple of 12"):
        build(tmp_path / "other", config, mesh=make_mesh(config), references=in_documents())


def test_compressed(tmp_path: Path, folder: Path) -> None:
    config = context_config(writer__compression="int8")
    build(tmp_path / "bank", config, references=in_documents())
    ours, theirs = Bank.open(tmp_path / "bank").read(ALL), Bank.open(folder).read(ALL)
    close(ours.values, theirs.values, 0.02 * np.abs(theirs.values).max())


# -- what is copied from another bank


def test_the_same_tokens_behind_other_text_are_encoded_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The document of 3 to 5 loses its first reference, a new one is put in front of all.
    order = np.array([34, *range(3), 4, 5, *range(6, COUNT)])
    references = in_documents()
    references.table, references.lengths = references.table[order], references.lengths[order]
    references.sizes = [1, 1, 2, 2, *SIZES[3:]]
    seen: set[int] = set()
    collect = encode.Encoder.collect

    def watched(self: Any, batch: Any, *rest: Any) -> Any:
        seen.update(batch.ids.tolist())
        return collect(self, batch, *rest)

    monkeypatch.setattr(encode.Encoder, "collect", watched)
    base = Bank.open(folder)
    report = build(tmp_path / "bank", context_config(), references=references, base=base)
    assert order[[4, 5]].tolist() == [4, 5]
    # 0 has the tokens of 34, which stood within a document; 4 and 5 have lost what was before them.
    assert seen == {0, 4, 5} and report["copied"] == len(order) - 3
    build(tmp_path / "fresh", context_config(), references=references)
    ours, fresh = Bank.open(tmp_path / "bank"), Bank.open(tmp_path / "fresh")
    ids = np.arange(len(order))
    close(ours.read(ids).keys, fresh.read(ids).keys)
    assert error(ours.read(ids[4:6]).keys, base.read(order[4:6]).keys) > 1e-3


def test_the_identity_is_that_of_all_tokens_in_order() -> None:
    documents = in_documents().documents()
    hashes = np.random.default_rng(0).integers(0, 2**64, COUNT, np.uint64)
    found = identities(documents, hashes, 3)
    np.testing.assert_array_equal(found[LEADS], hashes[LEADS])
    assert len(set(found.tolist())) == COUNT
    for i in ALL:
        for j in ALL:
            changed = hashes.copy()
            changed[j] ^= np.uint64(1)
            assert (identities(documents, changed, 3)[i] != found[i]) == (j in window_of(i))
    swapped = hashes.copy()
    swapped[[3, 4]] = hashes[[4, 3]]
    assert identities(documents, swapped, 3)[5] != found[5]


def test_the_other_kind_of_bank_is_refused(folder: Path, alone: Bank, tmp_path: Path) -> None:
    words = "document_context_references = 3, here 1"
    with pytest.raises(BankError, match=words):
        build(folder, tiny_config(), references=in_documents())
    with pytest.raises(BankError, match="document_context_references = 1, here 3"):
        build(tmp_path / "bank", context_config(), references=in_documents(), base=alone)
    wider = context_config(writer__document_context_tokens=48)
    with pytest.raises(BankError, match="written with document_context_references = 3, here 4"):
        build(tmp_path / "bank", wider, references=in_documents(), base=Bank.open(folder))


def test_a_bank_says_how_it_was_written() -> None:
    assert not {"document_context_references"} & set(layout_of(tiny_config(), (1, 2)))
    config, layout = tiny_config(), layout_of(context_config(), (1, 2))
    config.writer.update(writer_settings(layout))
    assert layout_of(config, (1, 2)) == layout
    config.writer.update(writer_settings(layout_of(tiny_config(), (1, 2))))
    assert not config.writer.document_context


# -- how rows are filled


@pytest.mark.parametrize("slots", [2, 3, 8])
def test_rows_hold_every_window_once_and_whole(slots: int) -> None:
    sizes = np.random.default_rng(slots).geometric(0.2, 400)
    documents = np.repeat(np.arange(400), sizes)
    wanted = np.ones(len(documents), bool)
    rows = list(packed_rows(documents, slots, wanted))
    own = np.concatenate([row.ids[row.own] for row in rows])
    np.testing.assert_array_equal(np.sort(own), np.arange(len(documents)))
    leads = np.flatnonzero(np.diff(documents, prepend=-1))
    for row in rows:
        for slot in np.flatnonzero(row.ids >= 0):
            window = row.ids[row.first[slot] : slot + 1]
            assert (documents[window] == documents[window[0]]).all()
            assert window[0] == leads[documents[window[0]]]
            assert (np.diff(window[1:]) == 1).all()
    used = {row.ids.tobytes() for row in rows}
    some = wanted & (np.random.default_rng(1).random(len(wanted)) < 0.01)
    fewer = list(packed_rows(documents, slots, some))
    assert len(fewer) < len(rows) / 4 or slots > 3
    assert {row.ids.tobytes() for row in fewer} <= used
    np.testing.assert_array_equal(
        np.sort(np.concatenate([row.ids[row.own] for row in fewer])), np.flatnonzero(some)
    )


def test_little_is_encoded_twice() -> None:
    """Documents as in an encyclopedia, with the default window of 8 references of 128 tokens."""
    random = np.random.default_rng(0)
    sizes = np.ceil(random.lognormal(1.2, 1.0, 3000)).astype(int)
    documents = np.repeat(np.arange(len(sizes)), sizes)
    rows = list(packed_rows(documents, 8, np.ones(len(documents), bool)))
    assert 8 * len(rows) / len(documents) < 1.2


def test_the_shape_of_a_call_has_whole_rows() -> None:
    config = context_config()
    assert encode.input_shapes(config) == [(5, 3, 12), (5, 3)]
    few = context_config(writer__batch_references=2)
    assert encode.input_shapes(few) == [(1, 3, 12), (1, 3)]
    assert encode.input_shapes(tiny_config()) == [(16, 12)]
