"""Refreshing a bank: what is measured against NumPy, what is rewritten against a new bank."""

import gc
import itertools
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data.data_workdir import make_workdir, tiny_config
from memory import memory_tiny as tiny
from memory_axes import by_reference
from quick import slow_among
from tolerance import close

from m3jax.checkpoint import read_meta
from m3jax.config import PREFIX_TOKENS
from m3jax.data.pipeline import open_pipeline
from m3jax.errors import BankError, ConfigError, VersionError
from m3jax.evaluation.staleness import Staleness, measure_staleness, staleness_table
from m3jax.knowledge.edit import edit, rollback
from m3jax.knowledge.maintain import compact, verify
from m3jax.knowledge.memory_writer import MemoryWriter, check_reader
from m3jax.knowledge.versions import open_bank, open_index, open_references, open_version, versions
from m3jax.make_model import make_model
from m3jax.memory.bank import Bank
from m3jax.memory.binding import slots_of
from m3jax.mesh import make_mesh
from m3jax.model.attention_mask import ExplicitMemory, KeyValues
from m3jax.text.documents import Document
from m3jax.text.references import References
from m3jax.text.tokenizer import Tokenizer
from m3jax.train import hooks, refresh
from m3jax.train.checkpoints import Checkpoints, knowledge_version
from m3jax.train.evaluator import LossEvaluator
from m3jax.train.metrics import read_metrics
from m3jax.train.optimizer import make_optimizer
from m3jax.train.refresh import rewrite
from m3jax.train.stage import train_stage
from m3jax.train.state import new_state

CHANGES = {
    "memory__reference_length": 20,
    "memory__layers": 2,
    "model__layers": 3,
    "evaluation__batches": 3,
    "evaluation__batch_size": 8,
    "data__batch_size": 8,
}
CONFIG = tiny_config(**CHANGES)


def weights(moved: float) -> Any:
    """The bank's writer after more training, which is noise here."""
    params = jax.jit(make_model(CONFIG, PREFIX_TOKENS).init)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [moved * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, [x + n for x, n in zip(leaves, noise, strict=True)])


def save(workdir: Path, stage: str, moved: float, writer: Any = None) -> None:
    tokenizer = Tokenizer.load(workdir / "tokenizer").fingerprint
    checkpoints = Checkpoints(workdir / stage, CONFIG, tokenizer, writer)
    params = weights(moved)
    with jax.set_mesh(make_mesh(CONFIG, jax.devices()[:1])):
        checkpoints.save(new_state(params, make_optimizer(CONFIG)), 7)
    checkpoints.close()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = make_workdir(tmp_path_factory.mktemp("prepared"), CONFIG)
    save(workdir, "warmup", 0.0)
    save(workdir, "moved", 0.05)
    save(workdir, "continual", 0.02, Bank.open(workdir / "bank").writer)
    return workdir


@pytest.fixture
def workdir(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "run"))


def opened(workdir: Path, number: int | None = None) -> tuple[Any, Any, Any]:
    version = open_version(workdir, number)
    references = open_references(CONFIG, version, Tokenizer.load(workdir / "tokenizer"))
    return references, open_index(version, references), open_bank(version, references)


def fresh(workdir: Path, stage: str, folder: Path) -> Bank:
    """What a checkpoint writes of the references as prepared."""
    write = MemoryWriter(CONFIG, workdir, workdir / stage, itself=True)
    write(References(workdir / "references"), folder)
    return Bank.open(folder)


@pytest.mark.slow
def test_what_its_own_writer_finds_is_not_stale(prepared: Path) -> None:
    found = measure_staleness(CONFIG, prepared, prepared / "warmup", progress=False)
    # Distances are differences of large sums: 1e-3 of a norm is the rounding of float32.
    assert max(found.keys + found.values) < 2e-3 and found.gain == 0 == found.gain_error
    assert found.losses["stored"] == found.losses["fresh"] != found.losses["none"]
    assert found.verdict.startswith("a rewrite does not pay: it changes the loss by 0.0000")


@pytest.mark.slow
def test_errors_and_losses_equal_a_rewritten_bank(workdir: Path, tmp_path: Path) -> None:
    bank = opened(workdir)[2]
    again = fresh(workdir, "moved", tmp_path / "fresh")
    found = measure_staleness(CONFIG, workdir, workdir / "moved", sample=50, progress=False)
    assert found.references == 50
    ids = np.sort(np.random.default_rng(0).permutation(bank.size)[:50])
    stored, new = by_reference(bank.read(ids)), by_reference(again.read(ids))
    for layer in range(2):
        distances, norms = np.zeros(2), np.zeros(2)
        for i, k in np.ndindex(50, CONFIG.model.kv_heads):
            n = stored.length[i]
            pairs = [np.asarray(m.keys)[i, layer, k, :n] for m in (stored, new)]
            values = [np.asarray(m.values)[i, layer, k, :n] for m in (stored, new)]
            for slot in range(n):
                apart = ((pairs[0][slot] - pairs[1]) ** 2).sum(-1)
                nearest = apart.argmin()
                distances += apart[nearest], ((values[0][slot] - values[1][nearest]) ** 2).sum()
            norms += (pairs[1] ** 2).sum(), (values[1] ** 2).sum()
        expected = np.sqrt(distances / norms)
        close([found.keys[layer], found.values[layer]], expected, 1e-4)
    pipeline = open_pipeline(CONFIG, workdir, split="validation", bank=tmp_path / "fresh")
    stored_losses = LossEvaluator(CONFIG, pipeline)
    losses = []
    for batch in stored_losses.each():
        loss, weight, _ = stored_losses.sums(weights(0.05), batch, "memory")
        losses.append(loss / weight)
    assert found.losses["fresh"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert found.losses["stored"] != found.losses["fresh"]
    assert "| 1 |" in staleness_table(found) and found.verdict in staleness_table(found)


@pytest.mark.parametrize("compression", ["none", "int8"])
@pytest.mark.parametrize("depth", slow_among([1, 2], [1]))
def test_slots_of_heads_with_counts_are_compared_by_loops(
    tmp_path: Path, compression: str, depth: int
) -> None:
    """Of a bank of two layers, with fresh memories of both or of the first alone."""
    rows = ["1:3+1", "2:0+5"]
    stored, fresh = (
        tiny.tiny_config(memory__layers=n, memory__counts=",".join(rows[:n])) for n in (2, depth)
    )
    stored.writer.compression = compression
    tiny.build(tmp_path / "old", stored, weights=0)
    bank = Bank.open(tmp_path / "old")
    stored.writer.compression = "none"
    tiny.build(tmp_path / "new", stored, weights=1)
    ids, params = np.array([0, 5, 6, 30, 36]), tiny.tiny_params(stored, 1)
    params["memory"] = jax.tree.map(lambda x: x[:depth], params["memory"])
    model, references = make_model(fresh, PREFIX_TOKENS), tiny.TinyReferences(37)
    references.tokenizer_fingerprint = "tokenizer"
    found, floor = refresh.compare_memories(fresh, model, params, references, bank, ids, False)
    old, new = (by_reference(b.read(ids)) for b in (bank, Bank.open(tmp_path / "new")))
    distances, norms = np.zeros((2, 2, 5, depth))
    starts = {(0, 0): (0, 3), (0, 1): (3, 1), (1, 1): (4, 5)}
    for i, ((layer, _), (start, count)) in itertools.product(range(5), starts.items()):
        if layer >= depth:
            continue
        end = start + min(count, references.lengths[ids[i]])
        keys, again = (m.keys[i, 0, 0, start:end].astype(float) for m in (old, new))
        values, afresh = (m.values[i, 0, 0, start:end].astype(float) for m in (old, new))
        for key, value in zip(keys, values, strict=True):
            nearest = ((key - again) ** 2).sum(-1).argmin()
            distances[0, i, layer] += ((key - again[nearest]) ** 2).sum()
            distances[1, i, layer] += ((value - afresh[nearest]) ** 2).sum()
        norms[:, i, layer] += (again**2).sum(), (afresh**2).sum()
    close(found.distances, distances, 1e-4)
    close(found.norms, norms)
    assert (floor is None) == (compression == "none" or depth == 1)
    if floor is not None:
        assert (floor.errors > 0).all() and (floor.errors < 0.02).all()


def test_the_worst_are_judged_by_the_first_layer_that_has_slots(
    prepared: Path, monkeypatch: Any
) -> None:
    probes: list[Any] = []

    def compared(config: Any, *rest: Any) -> Any:
        probes.append(config.copy_and_resolve_references())
        depth = config.memory.layers
        return refresh.Squares(np.ones((2, 3, depth)), np.ones((2, 3, depth))), None

    monkeypatch.setattr(refresh, "compare_memories", compared)
    monkeypatch.setattr(refresh, "restore_params", lambda *_, **__: (None, None))
    bank, references = Bank.open(prepared / "bank"), References(prepared / "references")
    expected = {"0:1+3,1:4+0": "0:1+3", "1:0+2": "1:0+2"}
    for counts, wanted in expected.items():
        config = tiny_config(**CHANGES, memory__counts=counts)
        assert len(refresh._first_layer_errors(config, "x", references, bank, "t")) == 3
        assert probes[-1].memory.counts == wanted
        assert probes[-1].memory.layers == wanted.count(",") + 1 + (wanted[0] == "1")


@pytest.mark.slow
def test_a_refreshed_version_is_written_by_the_checkpoint(workdir: Path, tmp_path: Path) -> None:
    edit(
        CONFIG,
        workdir,
        documents=[Document("Zork", "Zork otter", "Zork", "made up")],
        write=MemoryWriter(CONFIG, workdir, workdir / "warmup"),
    )
    before, old_index, old = opened(workdir)
    query = old_index.embedder.embed(["Zork"])
    version = rewrite(CONFIG, workdir, workdir / "continual")
    assert (version.number, version.note) == (2, "memories by continual step 7")
    references, index, bank = opened(workdir)
    assert references.fingerprint == before.fingerprint and verify(CONFIG, workdir) == []
    np.testing.assert_array_equal(index.search(query, 5)[0], old_index.search(query, 5)[0])
    everything = np.arange(bank.size)
    expected = fresh(workdir, "continual", tmp_path / "fresh")
    first = np.arange(expected.size)
    jax.tree.map(np.testing.assert_array_equal, bank.read(first), expected.read(first))
    stored = old.read(everything)
    assert np.abs(bank.read(everything).keys - stored.keys).max() > 0.01
    found = measure_staleness(CONFIG, workdir, workdir / "continual", progress=False)
    close(found.gain, 0.0, size=found.losses["fresh"])
    assert max(found.keys) < 2e-3
    # The checkpoint was trained on another writer, and reads what was written for it.
    pipeline = open_pipeline(CONFIG, workdir, split="validation")
    folder = workdir / "continual" / "checkpoints" / "7"
    check_reader(pipeline.bank, read_meta(folder), workdir / "continual")
    check_reader(pipeline.bank, read_meta(folder), tmp_path / "moved" / "continual")
    with pytest.raises(BankError, match="written by other weights"):
        check_reader(pipeline.bank, read_meta(folder) | {"run": "0" * 32}, workdir / "continual")
    # An edit goes on with the writer of the bank, a rollback with the old one.
    edits = MemoryWriter(CONFIG, workdir, like_base=True)
    edit(CONFIG, workdir, documents=[Document("New", "New fact", "New", "made up")], write=edits)
    assert opened(workdir)[2].writer["path"] == str(workdir / "continual")
    rollback(workdir, 1)
    jax.tree.map(np.testing.assert_array_equal, opened(workdir)[2].read(everything), stored)
    rollback(workdir, 2)
    del version, before, old_index, old, index, bank, references, pipeline
    gc.collect()  # a reader keeps what it reads
    collected, busy = compact(CONFIG, workdir, write=MemoryWriter(CONFIG, workdir))
    assert busy == [] and versions(workdir) == [collected.number]
    assert not (workdir / "bank").exists() and not (workdir / "versions" / "000002").exists()
    jax.tree.map(
        np.testing.assert_array_equal, opened(workdir)[2].read(first), expected.read(first)
    )


@pytest.mark.slow
def test_collecting_a_refresh_deletes_the_old_bank_alone(workdir: Path) -> None:
    rewrite(CONFIG, workdir, workdir / "moved")
    memory = opened(workdir)[2].read(np.arange(20))
    gc.collect()  # a reader keeps what it reads
    version, busy = compact(CONFIG, workdir, write=MemoryWriter(CONFIG, workdir))
    assert (version.number, busy) == (1, []) and versions(workdir) == [1]
    assert not (workdir / "bank").exists() and (workdir / "references").exists()
    jax.tree.map(np.testing.assert_array_equal, opened(workdir)[2].read(np.arange(20)), memory)
    with pytest.raises(VersionError, match="version 0 of .* was deleted"):
        open_version(workdir, 0)


@pytest.mark.slow
def test_the_worst_are_written_anew_the_others_kept(workdir: Path, tmp_path: Path) -> None:
    old = opened(workdir)[2]
    again = fresh(workdir, "moved", tmp_path / "fresh")
    rewrite(CONFIG, workdir, workdir / "moved", share=0.25)
    bank = opened(workdir)[2]
    ids = np.arange(bank.size)

    def equal(a: ExplicitMemory, b: ExplicitMemory) -> np.ndarray:
        same = (a.keys == b.keys) & (a.values == b.values)
        return np.asarray(same).all((0, 2, 3, 4))

    new, kept = equal(bank.read(ids), again.read(ids)), equal(bank.read(ids), old.read(ids))
    assert new.sum() == round(0.25 * len(ids)) and (new ^ kept).all()
    errors = np.zeros(len(ids))
    for i in ids:
        stored, fresh_one = old.read(ids[i : i + 1]), again.read(ids[i : i + 1])
        real = jnp.asarray(slots_of(old.binding.layout).in_counts(stored.length))
        pairs = (KeyValues(*map(jnp.asarray, one[:2])) for one in (stored, fresh_one))
        squares = refresh._squares(*pairs, real)  # checked against NumPy above
        distances, norms = (np.asarray(x)[:, 0, 0] for x in squares)
        errors[i] = (distances / norms).sum()
    assert errors[new].min() >= 0.99 * errors[kept].max() and errors[new].min() > 0
    assert bank.binding.writer == again.binding.writer
    measured = measure_staleness(CONFIG, workdir, workdir / "moved", progress=False)
    before = measure_staleness(CONFIG, workdir, workdir / "moved", progress=False, version=0)
    assert 0 < np.mean(measured.keys) < np.mean(before.keys)


@pytest.mark.slow
def test_memories_stay_stored_as_they_were(workdir: Path) -> None:
    references = opened(workdir)[0]
    shutil.rmtree(workdir / "bank")
    coded = CONFIG.copy_and_resolve_references()
    with coded.unlocked():
        coded.writer.compression = "int8"
    MemoryWriter(coded, workdir, workdir / "warmup")(references, workdir / "bank")
    found = measure_staleness(CONFIG, workdir, workdir / "warmup", progress=False)
    close(found.keys, found.key_floor, 0.2)
    assert 1e-3 < found.key_floor < 0.02 and "of compression alone" in staleness_table(found)
    rewrite(CONFIG, workdir, workdir / "moved")
    assert opened(workdir)[2].codec.name == "int8"


def test_what_cannot_be_refreshed_is_refused(workdir: Path) -> None:
    shutil.rmtree(workdir / "bank")
    with pytest.raises(VersionError, match="has no bank to refresh; write one with"):
        rewrite(CONFIG, workdir, workdir / "moved")
    with pytest.raises(BankError, match=r"bank holds no bank; run launch/write_bank.py"):
        measure_staleness(CONFIG, workdir, workdir / "moved", progress=False)
    assert versions(workdir) == [0]


def test_one_batch_says_nothing() -> None:
    losses = {"stored": 2.0, "fresh": 1.0, "none": 3.0}
    found = Staleness(1, [0.1], [0.1], 0.0, 0.0, 1.0, losses, 1.0, float("nan"))
    assert "too few validation rows" in found.verdict
    for gain, said in ((1.0, "rewrite pays"), (-1.0, "does harm"), (0.1, "does not pay")):
        changed = Staleness(1, [0.1], [0.1], 0.0, 0.0, 1.0, losses, gain, 0.1)
        assert said in changed.verdict


@pytest.mark.slow
def test_a_run_refreshes_its_bank_and_resumes(
    workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every second step, killed between a refresh and the next checkpoint or not."""
    schedule = {
        "train__steps": 5,
        "train__refresh_every": 2,
        "train__keep_every": 2,
        "train__checkpoint_every": 1,
        "train__keep_last": 9,
        "train__log_every": 1,
        "stage": "living",
    }
    config = tiny_config(**CHANGES, **schedule)
    other = Path(shutil.copytree(workdir, tmp_path / "other"))
    whole = train_stage(config, workdir)
    assert versions(workdir) == [0, 1, 2]  # after steps 2 and 4; after the last nobody reads
    assert opened(workdir)[2].writer["step"] == 4
    metas = {s: read_meta(workdir / "living" / "checkpoints" / str(s)) for s in range(1, 6)}
    assert [metas[s]["knowledge"] for s in range(1, 6)] == [0, 0, 1, 1, 2]
    assert [metas[s]["writer"]["step"] for s in range(1, 6)] == [0, 0, 2, 2, 4]
    losses = [line["loss"] for line in read_metrics(workdir / "living") if "loss" in line]

    class Stopped(Exception):
        pass

    def dies(*_: Any, **__: Any) -> None:
        raise Stopped

    # The first dies in step 3, after the refresh of step 2; the checkpoint of step 2 is the newest.
    with pytest.MonkeyPatch.context() as patch:
        real = hooks.RefreshBank.at

        def refresh_and_die(self: Any, *arguments: Any) -> Any:
            data = real(self, *arguments)
            patch.setattr(self.run.checkpoints, "save", dies)
            return data

        patch.setattr(hooks.RefreshBank, "at", refresh_and_die)
        with pytest.raises(Stopped):
            train_stage(config, other)
    assert knowledge_version(other / "living") == 0 and versions(other) == [0, 1]
    again = train_stage(config, other)
    assert versions(other) == [0, 1, 2] and again.loss == whole.loss
    assert "goes on with version" not in capsys.readouterr().out  # it begins with the refresh
    resumed = [line["loss"] for line in read_metrics(other / "living") if "loss" in line]
    assert resumed == losses
    with pytest.raises(ConfigError, match="must be a multiple of train.keep_every = 0"):
        tiny_config(**{**CHANGES, **schedule, "train__keep_every": 0})
