"""Guarded runs: what they survive, and that kills in between change nothing."""

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from train.guarded import BAD, guarded_config, guarded_run
from train.test_loop import Crash, crash_at, outcome, told_at

from m3jax.errors import CheckpointError, ConfigError, DivergenceError
from m3jax.train import checkpoints as checkpoints_module
from m3jax.train.checkpoints import kept
from m3jax.train.guard import Guard, batch_number, read_rollbacks
from m3jax.train.metrics import read_metrics
from m3jax.train.monitor import NOT_FINITE, SPIKE, Trouble

UNGUARDED = {"guard__on": False}


def steps_of(workdir, stage="warmup"):
    return sorted(int(path.name) for path in (workdir / stage / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def survived(tmp_path_factory):
    """An undisturbed guarded run over a NaN and a spike: config, workdir, summary, batches."""
    config, workdir = guarded_config(), tmp_path_factory.mktemp("survived")
    return config, workdir, *guarded_run(config, workdir, BAD)


# -- what a run survives ---------------------------------------------------------------------------
def test_a_nan_and_a_spike_are_survived_and_written_down(survived):
    config, workdir, summary, given = survived
    folder = workdir / config.stage
    nan, spike = read_rollbacks(folder)
    found = [[one[name] for name in ("reason", "first", "seen", "to")] for one in (nan, spike)]
    # The spike's first batch is number 29, which without three others is that of step 27.
    assert found == [[NOT_FINITE, 14, 14, 10], [SPIKE, 27, 28, 25]]
    assert (nan["skipped"], spike["skipped"]) == ([12, 15], [28, 32])
    assert [one["learning_rate_scale"] for one in (nan, spike)] == [0.5, 0.25]
    assert [step for step, _ in nan["losses"]] == [11, 12, 13, 14]
    assert [step for step, _ in spike["losses"]] == [26, 27, 28]
    assert summary.rollbacks == [nan, spike] and summary.step == 40
    assert np.isfinite(summary.loss)
    lines = read_metrics(folder)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 41))
    assert [(line["step"], line["guard"]) for line in lines if "guard" in line] == [
        (10, nan),
        (25, spike),
    ]
    rates = {line["step"]: line["learning_rate"] for line in lines if "loss" in line}
    assert [rates[step] for step in (10, 11, 25, 26)] == pytest.approx(
        [3e-3, 1.5e-3, 1.5e-3, 0.75e-3]
    )
    assert (folder / "loss.png").exists() and steps_of(workdir) == [30, 35, 40]


def test_the_batches_of_the_last_branch_are_those_without_the_skipped(survived):
    config, workdir, _, given = survived
    last = given[len(given) - given[::-1].index(28) - 1 :]  # from the second rollback on
    left_out = set(range(12, 15)) | set(range(28, 32))
    expected = [number for number in range(60) if number not in left_out][:40]
    assert [batch_number(done, sorted(left_out)) for done in range(40)] == expected
    assert expected[25:] == [number for number in last if number not in left_out][: 40 - 25]


@pytest.mark.slow
def test_without_the_guard_the_same_data_end_the_run(tmp_path):
    with pytest.raises(DivergenceError, match="not finite at step 14 .*let guard.on = True go"):
        guarded_run(guarded_config(**UNGUARDED), tmp_path, BAD)


@pytest.mark.slow
def test_a_guard_that_sees_nothing_changes_nothing(tmp_path):
    on, off = guarded_config(), guarded_config(**UNGUARDED)
    guarded_run(on, tmp_path / "on", {})
    guarded_run(off, tmp_path / "off", {})
    assert outcome(on, tmp_path / "on") == outcome(off, tmp_path / "off")
    assert not (tmp_path / "on" / "warmup" / "guard.json").exists()


HIGH = {
    "optimizer__learning_rate": 300.0,  # weight decay alone makes weights 29 times as large a step
    "train__steps": 60,
    "guard__factor": 0.1,
}


@pytest.mark.slow
def test_a_learning_rate_that_is_far_too_high_is_lowered_until_it_learns(tmp_path):
    with pytest.raises(DivergenceError, match="not finite"):
        guarded_run(guarded_config(**HIGH, **UNGUARDED), tmp_path / "off", {})
    start = read_metrics(tmp_path / "off" / "warmup")[1]["loss"]
    summary, _ = guarded_run(guarded_config(**HIGH), tmp_path / "on", {})
    assert 3 <= len(summary.rollbacks) <= 6
    assert summary.loss < start - 1 and summary.step == 60


@pytest.mark.slow
def test_a_run_that_cannot_be_helped_ends_with_one_message_and_more_tries_help(tmp_path):
    bad = dict.fromkeys(range(13, 18), "nan")
    changes = {"guard__skip_before": 0, "guard__skip_after": 0}
    config = guarded_config(guard__tries=2, **changes)
    with pytest.raises(DivergenceError) as caught:
        guarded_run(config, tmp_path, bad)
    message = str(caught.value)
    assert "gone back 2 times, which is config.guard.tries" in message and "0.25" in message
    with pytest.raises(DivergenceError, match="gone back 2 times"):
        guarded_run(config, tmp_path, bad)
    more = guarded_config(guard__tries=5, **changes)
    summary, _ = guarded_run(more, tmp_path, bad)
    # Twice to 10, then, as it went wrong soon again, twice to 5, and to the start.
    assert [one["to"] for one in summary.rollbacks] == [10, 10, 5, 5, 0]
    assert [one["skipped"] for one in summary.rollbacks] == [[n, n + 1] for n in range(13, 18)]
    assert summary.step == 40


# -- kills -----------------------------------------------------------------------------------------
def dying(monkeypatch, owner, name, calls, after=False):
    """Makes the nth call of a method die, before or after its work."""
    original, count = getattr(owner, name), iter(range(1, 1000))

    def method(*arguments, **named):
        now = next(count) == calls
        if now and not after:
            raise Crash
        result = original(*arguments, **named)
        if now:
            raise Crash
        return result

    monkeypatch.setattr(owner, name, method)


MOMENTS = {
    "a decision is not written": ("_decide", 1, True),
    "a decision is written": ("roll_back", 1, True),
    "the second one, too": ("roll_back", 2, True),
    "checkpoints are deleted": ("resume", 2, True),
}


@pytest.mark.parametrize(
    "moment",
    [
        "a decision is written",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in MOMENTS
            if name != "a decision is written"
        ),
    ],
)
def test_killed_between_noticing_and_going_back(survived, tmp_path, monkeypatch, moment):
    config, workdir, _, _ = survived
    name, calls, after = MOMENTS[moment]
    with monkeypatch.context() as patch, pytest.raises(Crash):
        dying(patch, Guard, name, calls, after)
        guarded_run(config, tmp_path, BAD)
    summary, _ = guarded_run(config, tmp_path, BAD)
    assert outcome(config, tmp_path) == outcome(config, workdir)
    assert steps_of(tmp_path) == steps_of(workdir)
    assert summary.rollbacks == read_rollbacks(workdir / config.stage)


@pytest.mark.slow
def test_killed_while_checkpoints_of_a_left_branch_are_deleted(tmp_path, monkeypatch):
    """A spike goes back over two checkpoints; one is renamed when the kill comes."""
    config = guarded_config(
        train__steps=32,
        train__checkpoint_every=2,
        train__keep_last=5,
        guard__patience=4,
        guard__loss_deviations=1.5,
        guard__rise_deviations=1e6,
    )
    bad = dict.fromkeys(range(21, 25), "noise")
    expected, killed = tmp_path / "expected", tmp_path / "killed"
    summary, _ = guarded_run(config, expected, bad)
    assert [(one["to"], one["seen"]) for one in summary.rollbacks] == [(20, 25)]

    remove = shutil.rmtree

    def dies(path, *arguments, **named):
        if Path(path).name.startswith("22") and Path(path).exists():
            raise Crash
        remove(path, *arguments, **named)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(checkpoints_module.shutil, "rmtree", dies)
        guarded_run(config, killed, bad)
    left = {path.name for path in (killed / "warmup" / "checkpoints").iterdir()}
    assert left == {"16", "18", "20", "22.orbax-checkpoint-tmp-deleted"}
    guarded_run(config, killed, bad)
    assert outcome(config, killed) == outcome(config, expected)
    assert steps_of(killed) == steps_of(expected)


@pytest.mark.slow
@pytest.mark.parametrize("crash", [12, 27])
def test_killed_elsewhere(survived, tmp_path, crash):
    config, workdir, _, _ = survived
    with pytest.raises(Crash):
        guarded_run(config, tmp_path, BAD, crash_at(crash))
    guarded_run(config, tmp_path, BAD)
    assert outcome(config, tmp_path) == outcome(config, workdir)


@pytest.mark.slow
def test_a_checkpoint_of_a_stopped_run_is_none_to_go_back_to(survived, tmp_path):
    config, workdir, _, _ = survived
    for at in (11, 24):  # saved at steps 12 and 22, just before the trouble
        with pytest.raises(SystemExit):
            guarded_run(config, tmp_path, BAD, told_at(at, signal.SIGTERM))
    guarded_run(config, tmp_path, BAD)
    assert outcome(config, tmp_path) == outcome(config, workdir)
    assert steps_of(tmp_path) == steps_of(workdir)


# -- the second stage, several devices -------------------------------------------------------------
@pytest.mark.slow
def test_the_second_stage_goes_back_to_the_parameters_it_began_with(survived, tmp_path):
    _, workdir, _, _ = survived
    config = guarded_config("precomputed", stage="continual", train__steps=12, mesh__fsdp=4)
    writer = {"hash": "abc", "path": "warmup", "step": 40}
    options = {"init_from": workdir / "warmup", "writer": writer}
    summary, given = guarded_run(config, tmp_path, {2: "nan"}, **options)
    assert [one["to"] for one in summary.rollbacks] == [0]
    assert given[given.index(0, 1) :][:5] == [0, 1, 2, 3, 4]  # read, but 1 to 3 are left out
    assert summary.loss < 5  # not that of random parameters, ln 264


# -- pieces ----------------------------------------------------------------------------------------
def target(steps, first, rollbacks=(), seen=None, **changes):
    guard = Guard.__new__(Guard)
    guard.config, guard.rollbacks = guarded_config(**changes), list(rollbacks)
    trouble = Trouble(SPIKE, first, first, first if seen is None else seen, "")
    return guard._target(trouble, steps)


def test_where_a_run_goes_back_to():
    assert target([], 3) == 0
    assert target([5, 10, 15], 12) == 10
    assert target([5, 10, 15], 10) == 5  # the step itself was bad
    assert target([5, 10], 4) == 0
    assert target([10, 15], 4) == 10  # the oldest that is left
    assert target([0, 10, 15], 4) == 10  # not an imported model, which is far behind
    assert target([0, 5], 4) == 0
    assert target([10, 12], 14) == 10  # 12 was saved when the run was stopped
    once, twice = [{"to": 10, "seen": 13}], [{"to": 10, "seen": 12}, {"to": 10, "seen": 13}]
    assert target([5, 10], 14, once) == 10
    assert target([5, 10], 14, twice) == 5
    assert target([5, 10], 14, [*twice, {"to": 5, "seen": 14}]) == 5
    assert target([10], 14, twice) == 10  # nothing before
    assert target([10], 13, [{"to": 5, "seen": 14}]) == 10  # 5 is gone
    assert target([5, 10, 15], 7, twice) == 5  # bad before the last checkpoint
    assert target([5, 10, 15], 18, twice) == 15  # it came further


def test_which_checkpoints_stay():
    config = guarded_config(train__keep_last=2, train__keep_every=20)
    assert kept([5, 10, 15], config) == {10, 15}
    assert kept([10, 15, 17], config) == {10, 15, 17}
    assert kept([20, 25, 30, 35], config) == {20, 30, 35}
    assert kept([0, 5, 10, 15], config) == {0, 10, 15}  # an imported model
    assert kept([], config) == set()


def test_numbers_of_batches_without_skipped_ones():
    assert [batch_number(done, [1, 2, 3, 5, 6, 7]) for done in range(4)] == [0, 4, 8, 9]


# -- refusals --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guard__factor": 0.0}, r"guard.factor = 0.0; accepted: \(0, 1\]"),
        ({"guard__factor": 1.5}, "guard.factor = 1.5"),
        ({"guard__window": 8}, "guard.window = 8; accepted"),
        ({"guard__patience": 9}, "guard.patience = 9: twice as many steps .* guard.window = 16"),
        ({"guard__loss_deviations": -1.0}, "guard.loss_deviations = -1.0"),
        ({"guard__tries": -1}, "guard.tries = -1"),
        (
            {"train__refresh_every": 10, "train__keep_every": 10},
            "train.refresh_every = 10: .*set guard.on = False",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        guarded_config("precomputed", **changes)


def test_a_run_that_has_gone_back_needs_its_guard(survived, tmp_path):
    _, workdir, _, _ = survived
    shutil.copytree(workdir, tmp_path / "copy")
    with pytest.raises(ConfigError, match="guard.on = False, but this run has gone back before"):
        guarded_run(guarded_config(**UNGUARDED), tmp_path / "copy", BAD)
    (tmp_path / "copy" / "warmup" / "guard.json").write_text('{"rollbacks": [')
    with pytest.raises(CheckpointError, match="guard.json is damaged"):
        guarded_run(guarded_config(), tmp_path / "copy", BAD)


@pytest.mark.slow
def test_a_run_without_a_guard_may_get_one(tmp_path):
    config = guarded_config(**UNGUARDED)
    with pytest.raises(DivergenceError):
        guarded_run(config, tmp_path, BAD)
    summary, _ = guarded_run(guarded_config(), tmp_path, BAD)
    assert [one["to"] for one in summary.rollbacks] == [10, 25]
