"""Where the time goes, on clocks that the tests turn."""

import threading
import time

import pytest
from train.tiny import tiny_config

from m3jax.mesh import make_mesh
from m3jax.train.clock import PARTS, Device, RunClock, Speed
from m3jax.train.metrics import Metrics, describe_time, read_metrics, time_spent


class Hand:
    """A clock's hand that the test moves."""

    def __init__(self):
        self.at = 100.0

    def __call__(self):
        return self.at

    def move(self, seconds):
        self.at += seconds


def spent(**parts):
    return {**dict.fromkeys(PARTS, 0.0), **parts}


def test_every_second_has_one_part():
    hand = Hand()
    clock = RunClock(hand)
    hand.move(5)
    clock.begin()
    hand.move(1)
    with clock.spent_on("checkpoint"):
        hand.move(2)
        with clock.spent_on("evaluation"):
            hand.move(4)
        hand.move(8)
    hand.move(16)
    assert clock.seconds() == spent(start=5, step=17, checkpoint=10, evaluation=4)
    assert clock.take() == spent(start=5, step=17, checkpoint=10, evaluation=4)
    assert clock.take() == spent()


@pytest.mark.parametrize(
    ("idle", "lost"),
    [(None, 0), (105.0, 2.0), (101.0, 4.0), (200.0, 0)],
    ids=["computes all the while", "idle for a part", "idle before", "idle after"],
)
def test_only_waiting_with_an_idle_device_is_lost(idle, lost):
    hand = Hand()
    clock = RunClock(hand)
    clock.begin()
    hand.move(3)
    with clock.waiting(lambda: idle):
        hand.move(4)
    assert clock.take() == spent(step=7 - lost, data_wait=lost)


def test_waiting_before_the_first_step_is_part_of_the_start():
    hand = Hand()
    clock = RunClock(hand)
    with clock.waiting(lambda: 0.0):
        hand.move(4)
    assert clock.take() == spent(start=4)


def test_the_device_is_idle_when_its_last_work_is_done():
    ready = threading.Event()

    class Work:
        def block_until_ready(self):
            assert ready.wait(60)
            return self

    device = Device()
    before = device.idle_since()
    assert before is not None
    device.give(Work())
    device.give(Work())
    assert device.idle_since() is None
    ready.set()
    end = time.monotonic() + 60
    while device.idle_since() is None and time.monotonic() < end:
        time.sleep(0.001)
    assert device.idle_since() > before
    device.close()


def test_speed_counts_neither_the_start_nor_evaluations():
    hand, config = Hand(), tiny_config()
    clock = RunClock(hand)
    speed = Speed(config, make_mesh(config), clock)
    hand.move(50)
    speed.step()
    assert "tokens_per_second" not in speed.report()
    for _ in range(4):
        hand.move(2)
        speed.step()
    with clock.spent_on("evaluation"):
        hand.move(100)
    with clock.spent_on("checkpoint"):
        hand.move(2)
    report = speed.report()
    assert report["tokens_per_second"] == pytest.approx(4 * 8 * 16 / 10)
    assert report["time"] == spent(step=8, evaluation=100, checkpoint=2)
    assert report["seconds"] == 160


def line(at, **parts):
    return {"step": at, "loss": 1.0, "time": spent(**parts)}


def test_goodput_counts_steps_once_and_the_time_between_starts(tmp_path):
    hand = Hand()
    metrics = Metrics(tmp_path, 0, now=hand)
    hand.move(20)
    metrics.write(line(5, start=10, step=10))  # half of the time since the first start
    hand.move(20)
    metrics.write(line(10, step=20))  # will be repeated
    metrics.close()
    hand.move(10)  # the machine is away
    metrics = Metrics(tmp_path, 5, now=hand)
    hand.move(50)
    metrics.write(line(10, start=20, step=20, data_wait=4, checkpoint=5, evaluation=1))
    metrics.close()
    lines = read_metrics(tmp_path)
    assert [entry.get("goodput") for entry in lines] == [None, 0.5, 0.3]
    found = time_spent(lines)
    parts = spent(start=30, step=30, data_wait=4, checkpoint=5, evaluation=1)
    assert found == {"goodput": 0.3, "seconds": 100, "lost": 30, **parts}
    assert describe_time(found) == (
        "0:01:40 since the first start: 30% steps (goodput), 4% waiting for data, 5% checkpoints,"
        " 1% evaluations, 30% starts and compiling, 30% lost between starts"
    )


def test_a_run_killed_before_its_first_checkpoint_keeps_its_first_start(tmp_path):
    hand = Hand()
    Metrics(tmp_path, 0, now=hand).close()
    hand.move(75)
    metrics = Metrics(tmp_path, 0, now=hand)
    hand.move(25)
    metrics.write(line(1, step=25))
    metrics.close()
    assert time_spent(read_metrics(tmp_path))["goodput"] == 0.25


def test_a_run_without_times_has_no_goodput(tmp_path):
    assert time_spent([{"step": 1, "loss": 2.0}]) == {}
    assert describe_time({}) == "not measured"
