"""launch/tpu_vm.sh against a simulated gcloud: the whole loop, with lost and failing slices."""

import shutil
import time

import pytest
from launch.tpu_cloud import FAKE_PYTHON, HARD, ROOT, call, executable
from quick import slow_among

ONCE = ["create", "scp", "mkdir", "start"]
ENDS = ("TERMINATED", "SUSPENDED", "FAILED", "STOPPED")


def test_watch_brings_up_runs_and_passes_success_on(cloud):
    done = cloud.call("watch", *cloud.command('echo "in $PWD"; command -v python'))
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ONCE
    assert "still rented" in done.stderr
    for i in (0, 1):
        home = cloud.folder / f"w-{i}"
        log = (home / "m3jax-runs/train/log").read_text()
        assert f"in {home}/m3jax\n{home}/m3jax-venv/bin/python\n" in log
        pip = (home / "python-calls").read_text()
        assert f"-c {home}/m3jax/constraints.txt -e {home}/m3jax[tpu,gcs]" in pip
    # Once more: the command has ended, so it is started again; it would resume and end at once.
    assert cloud.call("watch", *cloud.command("exit 0")).returncode == 0
    assert cloud.starts() == 2


@pytest.mark.parametrize("queued", slow_among([(), ("--queued",)], [()]))
def test_a_preempted_slice_is_rented_again_and_the_run_resumes(cloud, queued):
    # As on a real one: SIGTERM lets the command save and end with 0, the state follows later.
    command = cloud.command(
        'if [[ "$HOSTNAME" == w-0 && "$starts" == 1 ]]; then echo "2 PREEMPTED" >"$FAKE/later"; fi'
    )
    done = cloud.call("watch", *queued, *command)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == [*ONCE, "delete", *ONCE]
    assert cloud.starts() == 2
    assert "m3 was lost (PREEMPTED); trying again, 1 of 50" in done.stderr


@pytest.mark.parametrize("state", slow_among(ENDS, ENDS[1:]))
def test_other_ends_of_a_slice_count_as_preemption(cloud, state):
    command = cloud.command(
        f'[[ "$HOSTNAME" != w-0 || "$starts" != 1 ]] || {{ echo {state} >"$FAKE/node"; sleep 30; }}'
    )
    assert cloud.call("watch", *command).returncode == 0
    assert cloud.verbs() == [*ONCE, "delete", *ONCE]


@pytest.mark.slow
def test_retries_are_bounded(cloud):
    command = cloud.command('echo PREEMPTED >"$FAKE/node"')
    done = cloud.call("watch", "--retries=2", *command)
    assert done.returncode == 1
    assert "m3 was lost (PREEMPTED); that was attempt 3, and --retries=2" in done.stderr
    assert cloud.verbs() == [*ONCE, "delete", *ONCE, "delete", *ONCE]


def test_no_capacity_is_tried_again_and_bounded(cloud):
    (cloud.folder / "creates").write_text("STOCKOUT FAILED READY")
    assert cloud.call("watch", *cloud.command("exit 0")).returncode == 0
    assert cloud.verbs() == ["create", "create", "delete", *ONCE]
    cloud.call("delete")
    (cloud.folder / "creates").write_text("STOCKOUT STOCKOUT")
    done = cloud.call("watch", "--retries=1", *cloud.command("exit 0"))
    assert done.returncode == 1 and "could not be brought up" in done.stderr


def test_the_code_of_a_failing_command_is_passed_on(cloud):
    done = cloud.call(
        "watch", *cloud.command('[[ "$HOSTNAME" == w-0 ]] || { echo why; exit 7; }\n')
    )
    assert done.returncode == 7
    assert cloud.verbs() == [*ONCE, "stop", "tail"]
    assert "failed with code 7" in done.stderr and "still rented" in done.stderr


@pytest.mark.slow
def test_a_run_is_not_over_while_a_worker_does_not_answer(cloud):
    command = cloud.command(
        '[[ "$HOSTNAME" == w-0 ]] || { echo 5 >"$FAKE/away-w-1"; sleep 1; exit 8; }'
    )
    assert cloud.call("watch", *command).returncode == 8


@pytest.mark.slow
def test_restarts_are_bounded_and_not_for_mistakes_in_the_command(cloud):
    done = cloud.call("watch", "--restarts=1", *cloud.command("exit 9"))
    assert done.returncode == 9 and cloud.starts() == 2
    assert "starting it again, 1 of 1" in done.stderr
    assert cloud.call("watch", "--restarts=9", *cloud.command("exit 2")).returncode == 2
    assert cloud.starts() == 3
    mended = cloud.command('[[ "$starts" != 4 ]] || exit 9; sleep 1')
    assert cloud.call("watch", "--restarts=1", *mended).returncode == 0
    assert cloud.starts() == 5


@pytest.mark.slow
def test_a_machine_that_started_again_gets_its_run_again(cloud):
    # SIGKILL to the whole session, as after a reboot: there is a pid and no code.
    command = cloud.command('[[ "$HOSTNAME" != w-0 || "$starts" != 1 ]] || kill -KILL 0')
    done = cloud.call("watch", *command)
    assert done.returncode == 0, done.stderr
    assert "the machines of m3 lost the run train; trying again, 1 of 50" in done.stderr
    assert cloud.starts() == 2 and cloud.verbs() == [*ONCE, "stop", *ONCE[1:]]


@pytest.mark.slow
def test_watching_goes_on_where_it_was_left(cloud):
    command = cloud.command('while [[ ! -e "$FAKE/end" ]]; do sleep 0.1; done')
    assert cloud.call("create").returncode == 0
    early = cloud.call("run", *command)
    assert early.returncode == 2 and "use the subcommand install first" in early.stderr
    assert cloud.call("install").returncode == 0
    assert cloud.call("run", *command).returncode == 0
    assert cloud.call("status").stdout.splitlines()[0] == "m3 READY"
    again = cloud.call("run", *command)
    assert again.returncode == 2 and "the run train goes on on w-0" in again.stderr
    busy = cloud.call("install")
    assert busy.returncode == 2 and "before another version is installed" in busy.stderr
    other = cloud.call("watch", "--", "echo", "other")
    assert other.returncode == 2 and "is another command" in other.stderr
    blocked = cloud.call("watch", "--run=b", "--", "echo")
    assert blocked.returncode == 2 and "trying again" not in blocked.stderr
    (cloud.folder / "end").touch()
    assert cloud.call("logs", "--worker=all").returncode == 0  # ends with the run
    assert cloud.starts() == 1
    assert "exited 0" in cloud.call("status").stdout


@pytest.mark.slow
def test_stop_lets_the_command_save(cloud):
    command = cloud.command(
        'trap "echo saved; exit 0" TERM; touch "$FAKE/up-$HOSTNAME"; while :; do sleep 0.1; done'
    )
    for step in (("create",), ("install",), ("run", *command)):
        assert cloud.call(*step).returncode == 0
    while not (cloud.folder / "up-w-1").exists():
        time.sleep(0.05)
    stopped = cloud.call("stop")
    assert stopped.stdout.count("exited 0") == 2, stopped.stdout + stopped.stderr
    log = cloud.call("logs", "--worker=all").stdout
    assert "w-0: saved\n" in log and "w-1: saved\n" in log
    stubborn = cloud.command('trap "" TERM; touch "$FAKE/stubborn-$HOSTNAME"; sleep 60')
    assert cloud.call("run", "--run=b", *stubborn).returncode == 0
    while not (cloud.folder / "stubborn-w-1").exists():
        time.sleep(0.05)
    killed = cloud.call("stop", "--run=b")
    assert "did not end in 1 s, killed" in killed.stderr and killed.stdout.count("lost") == 2


@pytest.mark.slow
def test_without_an_answer_nothing_is_deleted(cloud):
    command = cloud.command('touch "$FAKE/offline"; sleep 20')
    silent = cloud.call("watch", *command)
    assert silent.returncode == 1 and "the connection is back" in silent.stderr
    (cloud.folder / "denied").touch()
    denied = cloud.call("watch", *command)
    assert denied.returncode == 1 and "PERMISSION_DENIED" in denied.stderr
    assert cloud.verbs() == ONCE


@pytest.mark.slow
def test_commands_arrive_on_the_workers_as_they_were_typed(cloud):
    for step in (("create",), ("install",)):
        assert cloud.call(*step).returncode == 0
    for number, command in enumerate(HARD):
        show = ("bash", "-c", 'printf "%s\\0" "$@" >"$HOME/seen"', "x", *command)
        assert cloud.call("watch", f"--run=r{number}", "--", *show).returncode == 0
        assert (cloud.folder / "w-1/seen").read_text().split("\0")[:-1] == list(command)


def test_install_sends_the_working_tree_and_keeps_what_runs_wrote(cloud):
    (cloud.checkout / ".gitignore").write_text("/runs/\n")
    (cloud.checkout / "new file.py").write_text("1\n")
    (cloud.checkout / "runs").mkdir()
    (cloud.checkout / "runs/big").write_text("local")
    for step in (("create",), ("install",)):
        assert cloud.call(*step).returncode == 0
    tree = cloud.folder / "w-0/m3jax"
    assert (tree / "new file.py").exists() and not (tree / "runs").exists()
    (tree / "runs").mkdir()
    (tree / "runs/checkpoint").write_text("precious")
    (cloud.checkout / "new file.py").unlink()
    (cloud.checkout / "setup.py").write_text("changed\n")
    assert cloud.call("install").returncode == 0
    assert not (tree / "new file.py").exists()
    assert (tree / "runs/checkpoint").read_text() == "precious"
    assert (tree / "setup.py").read_text() == "changed\n"
    assert cloud.call("install", "--ref=HEAD").returncode == 0
    assert (tree / "setup.py").read_text() == (ROOT / "setup.py").read_text()


def test_a_worker_without_a_new_python_gets_one(cloud, bare, tmp_path):
    for tool in ("basename", "comm", "tr", "xargs"):
        (bare / tool).symlink_to(str(shutil.which(tool)))
    executable(bare / "python3", FAKE_PYTHON)  # of this name: too old
    cloud.git("archive", "--format=tar.gz", f"--output={tmp_path}/t.tar.gz", "HEAD")
    worker = cloud.checkout / "launch/tpu_worker.sh"
    done = call(
        "install", tmp_path / "t.tar.gz", script=worker, path=bare, HOME=str(tmp_path), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "python-calls").read_text().splitlines()
    assert calls[1] == f"uv venv --seed --python 3.13 {tmp_path}/m3jax-venv"
    assert calls[0] == "pip install -q --user --upgrade uv" and "[tpu,gcs]" in calls[2]


def test_fetch_copies_what_is_there(cloud):
    assert cloud.call("create").returncode == 0
    nothing = cloud.call("fetch", "--workdir=runs/x", f"--to={cloud.folder}/to")
    assert nothing.returncode == 1 and "nothing copied from runs/x" in nothing.stderr
    stage = cloud.folder / "w-0/m3jax/runs/x/warmup"
    stage.mkdir(parents=True)
    for name in ("metrics.jsonl", "loss.png", "checkpoint"):
        (stage / name).write_text(name)
    (stage.parent / "report").mkdir()
    done = cloud.call("fetch", "--workdir=runs/x", f"--to={cloud.folder}/to")
    assert done.returncode == 0, done.stderr
    found = sorted(p.relative_to(cloud.folder / "to") for p in (cloud.folder / "to").rglob("*"))
    assert list(map(str, found)) == [
        *("continual", "report", "warmup", "warmup/loss.png", "warmup/metrics.jsonl")
    ]
