"""Usefulness: drops against a loop of forward passes, and planted memories that must be chosen."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from data import data_workdir
from data.data_workdir import WORLD, tiny_config
from data.data_workdir import write_text as write_people
from tolerance import close

from m3jax.config import PREFIX_TOKENS
from m3jax.data.pipeline import open_pipeline
from m3jax.errors import UsefulnessError, VersionError
from m3jax.knowledge.edit import rollback
from m3jax.knowledge.versions import open_references, open_version
from m3jax.make_model import make_model
from m3jax.memory.bank import Bank
from m3jax.mesh import make_mesh
from m3jax.model.attention_mask import ExplicitMemory
from m3jax.quickstart import people
from m3jax.selection import memory_value, select
from m3jax.selection.memory_value import (
    EVERYTHING,
    NOTHING,
    RowLosses,
    drops,
    measure_drops,
    row_losses,
)
from m3jax.selection.report import choice_table
from m3jax.selection.select import ratio, select_references, split_rows
from m3jax.text.tokenizer import Tokenizer
from m3jax.train.checkpoints import Checkpoints
from m3jax.train.optimizer import make_optimizer
from m3jax.train.state import new_state

CONFIG = tiny_config(text__validation_share=0.5, evaluation__batch_size=8)
QUICK: Any = {"sample": 8, "count": 8, "check": 8, "draws": 1}


@functools.cache
def initial_weights() -> Any:
    return jax.jit(make_model(CONFIG, PREFIX_TOKENS).init)(jax.random.key(0))


def write_text(folder: Path) -> tuple[str, str]:
    """More documents than other tests have, each of which tells about people."""
    documents, knowledge = write_people(folder)
    told = people.fact_documents(WORLD, 5, 300, chunks=6)
    people.write_jsonl(Path(documents), told)
    return documents, knowledge


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(data_workdir, "write_text", write_text)
        workdir = data_workdir.make_workdir(tmp_path_factory.mktemp("prepared"), CONFIG)
    tokenizer = Tokenizer.load(workdir / "tokenizer").fingerprint
    writer = Bank.open(workdir / "bank").writer
    checkpoints = Checkpoints(workdir / CONFIG.stage, CONFIG, tokenizer, writer)
    params = initial_weights()
    with jax.set_mesh(make_mesh(CONFIG, jax.devices()[:1])):
        checkpoints.save(new_state(params, make_optimizer(CONFIG)), 5)
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "run"))


def validation(workdir: Path, config: Any = CONFIG) -> Any:
    return open_pipeline(config, workdir, split="validation")


@jax.jit
def plain_logits(weights: Any, tokens: Any, memory: ExplicitMemory) -> Any:
    return make_model(CONFIG, PREFIX_TOKENS).logits(weights, tokens, memory)


def plain_loss(batch: Any, ids: np.ndarray, bank: Any) -> float:
    """Nats of the only row of a batch, with these memories."""
    memory = jax.tree.map(jnp.asarray, bank.read(ids))
    logits = np.asarray(
        plain_logits(initial_weights(), jnp.asarray(batch.tokens), memory), np.float64
    )
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(logs, batch.targets[..., None], axis=-1)[..., 0]
    return -float((chosen * batch.weights).sum())


@pytest.mark.slow
def test_drops_equal_a_loop_of_forward_passes(prepared: Path, tmp_path: Path) -> None:
    pipeline = validation(prepared)
    rows = np.array([1, 4, 20, 21, 33, 40, 41, 42, 43, 50])  # a whole batch and a part of one
    losses = RowLosses(CONFIG, pipeline.dequantize)
    measured = measure_drops(losses, pipeline, initial_weights(), rows, tmp_path / "m", {})
    found = {(row, i): drop for row, i, drop in zip(*drops(measured), strict=True)}
    expected, repeated = {}, 0
    for row in rows:
        batch = pipeline.read(np.array([row]))
        ids = batch.reference_ids
        present = plain_loss(batch, ids, pipeline.bank)
        (whole,) = measured[(measured["row"] == row) & (measured["absent"] == NOTHING)]
        assert whole["loss"] == pytest.approx(present, rel=1e-5)
        assert whole["weight"] == batch.weights.sum()
        for one in np.unique(ids[ids >= 0]):
            absent = plain_loss(batch, np.where(ids == one, -1, ids), pipeline.bank)
            expected[row, one] = absent - present
            repeated += (ids == one).sum() > 1
    assert found.keys() == expected.keys() and len(found) > 20 and repeated > 2
    close([found[pair] for pair in expected], list(expected.values()), 2e-3)
    without = row_losses(losses, pipeline, initial_weights(), rows, EVERYTHING)
    batch = pipeline.read(rows[:1])
    nothing = plain_loss(batch, np.full_like(batch.reference_ids, -1), pipeline.bank)
    assert without["loss"][0] == pytest.approx(nothing, rel=1e-5) and len(without) == 10


def learned_memory(workdir: Path) -> ExplicitMemory:
    """A memory that lowers the loss of training rows, found by gradient descent."""
    pipeline, model = open_pipeline(CONFIG, workdir), make_model(CONFIG, PREFIX_TOKENS)
    batch = pipeline.read(np.arange(0, 60, 4))
    start = pipeline.bank.read(np.zeros(1, np.int64))
    parts: Any = tuple(jnp.asarray(x[:, 0]) for x in start[:2])

    def loss(parts: Any) -> Any:
        lead = batch.reference_ids.shape
        many = [
            jnp.broadcast_to(x[:, None, None, None], (len(x), *lead, *x.shape[1:])) for x in parts
        ]
        length = jnp.full(batch.reference_ids.shape, CONFIG.memory.kept_tokens)
        memory = ExplicitMemory(many[0], many[1], length)
        tokens, targets, weights = (
            jnp.asarray(getattr(batch, name)) for name in ("tokens", "targets", "weights")
        )
        hidden = model.hidden(initial_weights(), tokens, memory=memory)
        return model.summed_loss(initial_weights(), hidden, targets, weights)[0] / weights.sum()

    optimizer = optax.adam(0.1)
    step = jax.jit(jax.value_and_grad(loss))
    state, first = optimizer.init(parts), None
    for _ in range(40):
        value, gradient = step(parts)
        first = value if first is None else first
        updates, state = optimizer.update(gradient, state)
        parts = optax.apply_updates(parts, updates)
    assert value < first - 0.05, "the planted memory is of no use"
    return ExplicitMemory(*(np.asarray(x) for x in parts), start.length[0])


@pytest.mark.slow
def test_planted_memories_are_chosen_and_lower_the_loss_of_other_documents(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted, real = learned_memory(workdir), Bank.read_stored
    useful = np.flatnonzero(np.random.default_rng(4).random(80) < 0.5)

    def read_stored(self: Bank, ids: np.ndarray) -> ExplicitMemory:
        memory = real(self, ids)
        here = np.isin(ids, useful)
        memory.keys[:, here] = planted.keys[:, None]
        memory.values[:, here] = planted.values[:, None]
        memory.length[here] = CONFIG.memory.kept_tokens
        return memory

    monkeypatch.setattr(Bank, "read_stored", read_stored)
    each = Bank.open(workdir / "bank").bytes // 80
    some = open_pipeline(CONFIG, workdir).retrieved(np.arange(100))
    budget = each * len(np.intersect1d(useful, some))
    numbers: Any = {"sample": 100, "count": 200, "check": 50, "draws": 3}
    report = select_references(CONFIG, workdir, budget, **numbers)
    lines = (workdir / "report/usefulness/chosen.jsonl").read_text().splitlines()
    listed = [json.loads(line) for line in lines]
    assert report["chosen"] == len(listed) == budget // each
    references = validation(workdir).references
    ids = [references.find(record["key"]) for record in listed]
    assert np.isin(ids, useful).mean() > 0.9
    worths = [record["worth"] for record in listed]
    assert worths == sorted(worths, reverse=True) and worths[-1] > 0
    for name in ("random - chosen", "none - chosen"):
        change, error = report["differences"][name]
        assert change > 3 * error > 0
    assert report["losses"]["chosen"][0] < report["losses"]["random"][0]
    assert min(report["random_draws"]) > report["losses"]["chosen"][0]
    shown = choice_table(report)
    assert "the choice is better than a random one" in shown
    assert f"{report['losses']['chosen'][0]:.4f}" in shown and f"{each} each" in shown
    picture = (workdir / "report/usefulness/usefulness.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


@pytest.fixture
def helpful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every memory helps, which those of weights that were never trained do not."""

    def changed(measured: Any) -> Any:
        rows, references, changes = drops(measured)
        return rows, references, np.abs(changes) + 0.1

    monkeypatch.setattr(select, "drops", changed)


@pytest.mark.slow
def test_the_choice_becomes_a_version_that_finds_nothing_else(workdir: Path, helpful: None) -> None:
    each = Bank.open(workdir / "bank").bytes // 80
    dry = select_references(CONFIG, workdir, 12 * each + each // 2, **QUICK, dry_run=True)
    assert open_version(workdir).number == 0 and "new_version" not in dry
    report = select_references(CONFIG, workdir, 12 * each, **QUICK)
    version = open_version(workdir)
    assert version.number == report["new_version"] == 1
    assert report["losses"] == dry["losses"] and report["chosen"] == dry["chosen"] == 12
    assert version.note == "12 of 80 references, by usefulness"
    references = open_references(CONFIG, version, Tokenizer.load(workdir / "tokenizer"))
    live = references.live
    records = (workdir / "report/usefulness/chosen.jsonl").read_text().splitlines()
    assert {json.loads(line)["key"] for line in records} == set(references.live_keys())
    ids = validation(workdir).retrieved(np.arange(10))
    assert np.isin(ids[ids >= 0], live).all() and (ids >= 0).any()
    # Rows that carry keys of what was removed read nothing in their place.
    stored = tiny_config(
        retrieval__ids="stored", data__packing="document", evaluation__batch_size=8
    )
    ids = validation(workdir, stored).retrieved(np.arange(20))
    rollback(workdir, 0)
    before = validation(workdir, stored).retrieved(np.arange(20))
    np.testing.assert_array_equal(ids, np.where(np.isin(before, live), before, -1))
    assert (ids != before).any()
    rollback(workdir, 1)
    again = select_references(CONFIG, workdir, 5 * each, version=0, **QUICK, dry_run=True)
    assert (again["version"], again["references"], again["chosen"]) == (0, 80, 5)
    with pytest.raises(UsefulnessError, match="version 0 is not the current one"):
        select_references(CONFIG, workdir, 5 * each, version=0, **QUICK)


@pytest.mark.slow
def test_a_stopped_measurement_goes_on_where_it_was(
    workdir: Path, helpful: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = Bank.open(workdir / "bank").bytes // 80
    numbers = {"sample": 20, "count": 0, "check": 8, "draws": 1}
    ask: Any = {**numbers, "dry_run": True}
    whole = select_references(CONFIG, workdir, 9 * each, **ask)
    shutil.rmtree(workdir / "report")
    real, asked = memory_value._measure_batch, []

    def stop(*arguments: Any) -> Any:
        asked.append(arguments[-1].tolist())
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(memory_value, "_measure_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        select_references(CONFIG, workdir, 9 * each, **ask)
    assert select_references(CONFIG, workdir, 9 * each, **ask) == whole
    assert [len(rows) for rows in asked] == [8, 8, 8, 4] and asked[1] == asked[2]
    # Another question is measured anew.
    asked.append([])
    select_references(CONFIG, workdir, 9 * each, **{**ask, **QUICK})
    assert len(asked) == 6


def test_the_same_documents_are_not_on_both_sides(prepared: Path) -> None:
    for packing in ("concat", "document"):
        pipeline = validation(prepared, tiny_config(data__packing=packing))
        document = pipeline.rows.document_of(np.arange(len(pipeline.rows)))
        for row in (0, 7, len(document) - 1):
            starts = pipeline.rows.corpus[int(document[row])].tokens
            if packing == "document":
                inside = pipeline.rows[row].inputs[:10]
                assert inside.tobytes() in np.asarray(starts, inside.dtype).tobytes()
        sample, check = split_rows(pipeline, 15, 10, 0)
        assert len(np.intersect1d(document[sample], document[check])) == 0
        assert len(sample) == 15 and len(check) == 10 and (np.diff(sample) > 0).all()
        again = split_rows(pipeline, 15, 10, 0)
        np.testing.assert_array_equal(sample, again[0])
        everything = split_rows(pipeline, 10**6, 10**6, 0)
        assert abs(len(everything[0]) - len(everything[1])) < 0.2 * len(document)


def test_the_error_of_a_ratio_is_that_of_repeated_draws() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 3)
    means, errors = [], []
    for _ in range(400):
        values = rng.normal(size=60)[groups] + 0.1 * rng.normal(size=180)
        weights = rng.uniform(0.5, 1.5, 180)
        mean, error = ratio(values * weights, weights, groups)
        means.append(mean)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)
    mean, error = ratio(np.ones(1), np.ones(1), np.zeros(1, np.int64))
    assert mean == 1 and np.isnan(error)


def test_what_cannot_be_chosen_is_refused(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    each = Bank.open(workdir / "bank").bytes // 80
    with pytest.raises(UsefulnessError, match=f"={each - 1} is less than one memory .* {each} by"):
        select_references(CONFIG, workdir, each - 1)
    none = tiny_config(memory__source="none")
    with pytest.raises(UsefulnessError, match="the stage 'warmup' reads no memory"):
        select_references(none, workdir, each)
    chats = tiny_config(data__packing="chats")
    with pytest.raises(UsefulnessError, match="config.data.packing = 'chats'"):
        select_references(chats, workdir, each)
    with pytest.raises(UsefulnessError, match=r"--sample=0, --check=8: at least one row"):
        select_references(CONFIG, workdir, each, sample=0, check=8)
    with pytest.raises(VersionError, match="has no version 3"):
        select_references(CONFIG, workdir, each, version=3)

    def harmful(measured: Any) -> Any:
        rows, references, changes = drops(measured)
        return rows, references, -np.abs(changes) - 1

    monkeypatch.setattr(select, "drops", harmful)
    with pytest.raises(UsefulnessError, match="no reference is expected to lower the loss"):
        select_references(CONFIG, workdir, each, **QUICK)
    monkeypatch.setattr(select, "drops", lambda m: (np.zeros(0, np.int64),) * 3)
    with pytest.raises(UsefulnessError, match="no chunk of the measured rows finds any"):
        select_references(CONFIG, workdir, each, **QUICK)
    assert open_version(workdir).number == 0
