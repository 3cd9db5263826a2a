"""launch/tpu_vm.sh: the exact commands of a dry run, and the loop against a gcloud that simulates.

The simulated gcloud keeps a slice of two workers as two folders; what is sent to a worker is really
executed there, by launch/tpu_worker.sh from the archive that `install` has sent.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = "launch/tpu_vm.sh"
TOOLS = (
    "awk bash cat cksum cp cut date dirname env git grep gzip mkdir mv rm sed sleep sort tail tar"
)
PLACE = ("--name=m3", "--zone=us-west4-a")
TYPE = "--type=v5litepod-256"

FAKE_GCLOUD = """#!{python}
import glob, json, os, shutil, subprocess, sys
from pathlib import Path

home, args = Path(os.environ["FAKE"]), sys.argv[1:]
node = home / "node"
with open(home / "calls", "a") as calls:
    calls.write(json.dumps(args) + "\\n")
if sys.stdin.read():
    sys.exit("gcloud was given something to read")
flags = dict(a[2:].split("=", 1) for a in args if a.startswith("--") and "=" in a)
words = [a for a in args if not a.startswith("--")]


def workers():
    which = flags.get("worker", "0")
    return [home / f"w-{{i}}" for i in ((0, 1) if which == "all" else (int(which),))]


def create():
    plan = home / "creates"  # a line for each call: the state it ends in
    states = plan.read_text().split() if plan.exists() else []
    plan.write_text("\\n".join(states[1:]))
    state = states[0] if states else "READY"
    if state == "STOCKOUT":
        sys.exit("ERROR: There is no more capacity in the zone")
    node.write_text(state)
    for i in (0, 1):
        shutil.rmtree(home / f"w-{{i}}", ignore_errors=True)
        (home / f"w-{{i}}").mkdir()


def describe():
    later = home / "later"  # "N STATE": the state from the N-th look on
    if later.exists():
        looks, state = later.read_text().split()
        later.write_text(f"{{int(looks) - 1}} {{state}}")
        if int(looks) <= 1:
            node.write_text(state)
            later.unlink()
    if (home / "denied").exists():
        sys.exit("ERROR: PERMISSION_DENIED: tpu.nodes.get")
    if not node.exists():
        sys.exit("ERROR: NOT_FOUND: Resource was not found")
    state = node.read_text().strip()
    print("WARNING: a newer gcloud is there", file=sys.stderr)
    queued = {{"READY": "ACTIVE", "PREEMPTED": "ACTIVE"}}
    print(queued.get(state, state) if "queued-resources" in words else state)


def ssh():
    if not node.exists() or node.read_text().strip() != "READY" or (home / "offline").exists():
        sys.exit("ERROR: this TPU is terminated")
    code = 0
    for folder in workers():
        away = home / f"away-{{folder.name}}"  # for how many commands it does not answer
        if away.exists():
            left = int(away.read_text()) - 1
            away.write_text(str(left)) if left else away.unlink()
            code = 255
            continue
        environment = {{**os.environ, "HOME": str(folder), "HOSTNAME": folder.name}}
        done = subprocess.run(["bash", "-c", flags["command"]], cwd=folder, env=environment)
        code = code or done.returncode
    sys.exit(code)


def scp():
    source, target = words[4:6]
    for folder in workers():
        if ":" in target:
            shutil.copy(source, folder / target.split(":")[1])
        else:
            found = glob.glob(str(folder / source.split(":")[1]))
            for path in found:
                if os.path.isdir(path):
                    shutil.copytree(path, Path(target) / Path(path).name)
                else:
                    shutil.copy(path, target)
            sys.exit(0 if found else "scp: no such file")


if words[:3] != ["compute", "tpus", "tpu-vm"] and words[2:3] != ["queued-resources"]:
    sys.exit("unexpected " + str(args))
if words[3] == "delete":
    node.unlink()
else:
    {{"create": create, "describe": describe, "ssh": ssh, "scp": scp}}[words[3]]()
"""
# An interpreter that is new enough, makes environments of itself, and notes what pip shall do.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$1 ${2:-}" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") echo "pip ${*:3}" >>"$HOME/python-calls" ;;
  "-m uv") echo "uv ${*:3}" >>"$HOME/python-calls"
    mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
  "-c import"*) [[ "$(basename "$0")" != python3 ]] ;;
esac
"""


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)


def call(*arguments, path, cwd=ROOT, script=SCRIPT, **environment):
    base = {"PATH": str(path), "HOME": "/home/me", "LC_ALL": "C.UTF-8"}
    command = ["bash", str(script), *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=cwd,
        env={**base, **environment},
        input="y\n",  # nobody asks, nobody reads it
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.fixture
def bare(tmp_path):
    """A folder for PATH with what the script needs, and no gcloud."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for tool in TOOLS.split():
        (folder / tool).symlink_to(str(shutil.which(tool)))
    return folder


def dry(bare, *arguments, **environment):
    done = call("--dry_run", *arguments, path=bare, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


# --- dry runs -------------------------------------------------------------------------------------

GCLOUD = "gcloud compute tpus"
SSH = f"{GCLOUD} tpu-vm ssh m3 --zone=us-west4-a"
DESCRIBE = f"{GCLOUD} tpu-vm describe m3 --zone=us-west4-a --format='value(state)'"
QUEUED_DESCRIBE = (
    f"{GCLOUD} queued-resources describe m3 --zone=us-west4-a --format='value(state.state)'"
)
CREATE = (
    f"{GCLOUD} tpu-vm create m3 --zone=us-west4-a --accelerator-type=v5litepod-256"
    " --version=v2-alpha-tpuv5-lite --quiet"
)
CACHE = "/home/me/.cache/m3jax"
PACK = [
    f"mkdir -p {CACHE}",
    f"rm -f {CACHE}/m3.index",
    f"env GIT_INDEX_FILE={CACHE}/m3.index git -C {ROOT} read-tree HEAD",
    f"env GIT_INDEX_FILE={CACHE}/m3.index git -C {ROOT} add --all",
    f"git -C {ROOT} archive --format=tar.gz --output={CACHE}/m3.tar.gz"
    f' "$(env GIT_INDEX_FILE={CACHE}/m3.index git -C {ROOT} write-tree)"',
]
SEND = [
    f"{GCLOUD} tpu-vm scp {CACHE}/m3.tar.gz m3:m3jax.tar.gz --zone=us-west4-a --worker=all --quiet",
    f"{SSH} --worker=all --quiet --command='mkdir -p m3jax && tar -xzf m3jax.tar.gz -C m3jax launch"
    " && bash m3jax/launch/tpu_worker.sh install m3jax.tar.gz'",
]
START = (
    f"{SSH} --worker=all --quiet --command='bash m3jax/launch/tpu_worker.sh start train"
    " python launch/train.py --config=c.py --distributed'"
)
STATUS = f"{SSH} --worker=all --quiet --command='bash m3jax/launch/tpu_worker.sh status train'"
TRAIN = ("--", "python", "launch/train.py", "--config=c.py", "--distributed")
BUCKET = [
    "mkdir -p runs/m3/warmup",
    "gcloud storage cp gs://b/run/warmup/metrics.jsonl runs/m3/warmup/",
    "gcloud storage cp 'gs://b/run/warmup/*.png' runs/m3/warmup/",
    "gcloud storage cp --recursive gs://b/run/report runs/m3/",
]
SCP = f"{GCLOUD} tpu-vm scp"
HERE = "--zone=us-west4-a --worker=0 --quiet"
DISK = [
    "mkdir -p 'my reports/continual'",
    f"{SCP} m3:m3jax/runs/x/continual/metrics.jsonl 'my reports/continual/' {HERE}",
    f"{SCP} 'm3:m3jax/runs/x/continual/*.png' 'my reports/continual/' {HERE}",
    f"{SCP} --recurse m3:m3jax/runs/x/report 'my reports/' {HERE}",
]
QUEUE = (
    f"{GCLOUD} queued-resources create m3 --node-id=m3 --zone=us-west4-a --project=p"
    " --accelerator-type=v6e-256 --runtime-version=v2-alpha-tpuv6e --spot --network=n"
    " --subnetwork=s --internal-ips --service-account=a@p.iam --valid-until-duration=6h --quiet"
)
QUEUE_FLAGS = (
    *("--queued", "--spot", "--project=p", "--type=v6e-256", "--network=n", "--subnetwork=s"),
    *("--internal_ips", "--service_account=a@p.iam", "--valid_until=6h"),
)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("create", TYPE), [CREATE, DESCRIBE]),
        (("create", TYPE, "--spot"), [CREATE.replace("--quiet", "--spot --quiet"), DESCRIBE]),
        (("create", "--type=v4-8", "--version=mine", "--reserved"), [
            f"{GCLOUD} tpu-vm create m3 --zone=us-west4-a --accelerator-type=v4-8 --version=mine"
            " --reserved --quiet", DESCRIBE]),
        (("create", *QUEUE_FLAGS), [
            QUEUE,
            QUEUED_DESCRIBE.replace("us-west4-a", "us-west4-a --project=p"),
            DESCRIBE.replace("us-west4-a", "us-west4-a --project=p")]),
        (("install",), PACK + SEND),
        (("install", "--ref=v1.0"), [
            PACK[0],
            f"git -C {ROOT} archive --format=tar.gz --output={CACHE}/m3.tar.gz v1.0",
            *SEND]),
        (("run", *TRAIN), [START]),
        (("run", "--run=bank", "--worker=0", "--internal_ips", "--", "make"), [
            f"{SSH} --worker=0 --internal-ip --quiet"
            " --command='bash m3jax/launch/tpu_worker.sh start bank make'"]),
        (("watch", TYPE, *TRAIN),
         [DESCRIBE, CREATE, DESCRIBE, *PACK, *SEND, START, DESCRIBE, STATUS]),
        (("logs",),
         [f"{SSH} --worker=0 --quiet --command='bash m3jax/launch/tpu_worker.sh logs train 0'"]),
        (("logs", "--worker=all", "--run", "bank"),
         [f"{SSH} --worker=all --quiet --command='bash m3jax/launch/tpu_worker.sh logs bank all'"]),
        (("status",), [DESCRIBE, STATUS]),
        (("stop",), [STATUS.replace("status", "stop")]),
        (("fetch", "--workdir=gs://b/run/", "--stages=warmup"), BUCKET),
        (("fetch", "--workdir=runs/x", "--stages=continual", "--to=my reports"), DISK),
        (("fetch", "--workdir=/data/x", "--stages=continual", "--to=my reports"),
         [line.replace("m3jax/runs/x", "/data/x") for line in DISK]),
        (("delete",), [f"{GCLOUD} tpu-vm delete m3 --zone=us-west4-a --quiet"]),
        (("delete", "--queued"),
         [f"{GCLOUD} queued-resources delete m3 --zone=us-west4-a --force --quiet"]),
    ],
)  # fmt: skip
def test_dry_run_prints_the_commands(bare, tmp_path, arguments, expected):
    assert dry(bare, *PLACE, *arguments) == expected
    executable(bare / "gcloud", f"#!/bin/sh\necho called >>{tmp_path}/called\n")
    executable(bare / "other", f"#!/bin/sh\necho called >>{tmp_path}/called\n")
    for tool in ("git", "mkdir", "rm", "sleep"):
        (bare / tool).unlink()
        (bare / tool).symlink_to("other")
    assert dry(bare, *PLACE, *arguments) == expected
    assert not (tmp_path / "called").exists()


HARD = [
    ("python", "a b", "it's", 'say "hi"', "$HOME", "`id`", "*", "a;b|c&d", "\\", "", "ü", "~", "#"),
    ("echo", "'", "''", "a'b'c", "--flag=x y", "{a,b}", "!x", "$(id)", "tab\there", "line\nbreak"),
]


@pytest.mark.parametrize("command", HARD)
def test_commands_survive_both_shells(bare, command):
    (line,) = dry(bare, *PLACE, "run", "--", *command)
    if "\n" not in "".join(command):
        sent = next(word for word in shlex.split(line) if word.startswith("--command="))
        assert shlex.split(sent[len("--command=") :])[4:] == list(command)
    shown = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True)
    sent = next(w for w in shown.stdout.split("\0") if w.startswith("--command="))[10:]
    there = subprocess.run(["bash", "-c", f"printf '%s\\0' {sent}"], capture_output=True, text=True)
    assert there.stdout.split("\0")[4:-1] == list(command)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no subcommand"),
        (PLACE, "no subcommand"),
        ((*PLACE, "launch"), "unknown subcommand launch"),
        ((*PLACE, "create"), "--type is missing"),
        ((*PLACE, "create", "--type=v9-8"), "no runtime version known for --type=v9-8"),
        (("--zone=z", "status"), "--name is missing"),
        (("--name=m3", "status"), "--zone is missing"),
        (("--name=My_TPU", "--zone=z", "status"), "--name is My_TPU"),
        ((*PLACE, "status", "--bogus=1"), "unknown flag --bogus"),
        ((*PLACE, "status", "--run"), "--run needs a value"),
        ((*PLACE, "status", "more"), "unexpected argument more"),
        ((*PLACE, "status", "--run=a b"), "--run is a b"),
        ((*PLACE, "status", "--worker=some"), "--worker is some"),
        ((*PLACE, "status", "--spot=maybe"), "--spot is maybe"),
        ((*PLACE, "status", "--poll=1m"), "--poll is 1m"),
        ((*PLACE, "status", "--valid_until=6h"), "--valid_until needs --queued"),
        ((*PLACE, "fetch"), "--workdir is missing"),
        ((*PLACE, "run"), "run needs a command after --"),
        ((*PLACE, "watch", TYPE, "--"), "watch needs a command after --"),
        ((*PLACE, "stop", "--", "ls"), "stop takes no command"),
        ((*PLACE, "status"), "gcloud is not on the PATH"),
    ],
)
def test_mistakes_end_with_one_message(bare, arguments, message):
    done = call(*arguments, path=bare)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.slow
def test_every_flag_is_in_the_help_and_in_the_environment(bare):
    shown = call("--help", path=bare).stdout
    values = dict(re.findall(r"^  --(\w+)(?:=(\S+))?  ", shown, re.MULTILINE))
    declared = set(re.findall(r'(\w+)="\$\{M3JAX_TPU_\w+:-', (ROOT / SCRIPT).read_text()))
    assert set(values) - {"help"} == declared - {"subnetwork"} and "--subnetwork=" in shown
    for flag in declared - {"dry_run"}:
        value = {"poll": "5", "worker": "3", "workdir": "gs://b/r"}.get(flag, "1")
        if flag in ("name", "type"):
            value = "v5p-128"
        arguments = ["--name=m3", "--zone=z", TYPE, "--queued", "--workdir=gs://a/b"]
        others = [a for a in arguments if not a.startswith(f"--{flag}")]
        for tail in (["create"], ["install"], ["status"], ["fetch"], ["delete"]):
            by_flag = dry(bare, *others, f"--{flag}={value}", *tail)
            assert by_flag == dry(bare, *others, *tail, **{f"M3JAX_TPU_{flag.upper()}": value})
    changed = dry(bare, *PLACE, "status", M3JAX_TPU_RUN="other")
    assert changed != dry(bare, *PLACE, "status")


def test_docs_pod_can_be_followed(bare):
    text = (ROOT / "docs" / "pod.md").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if re.match(r"\s+\S", line)]
    exports = [line for line in lines if line.startswith("export ")]
    commands = [line for line in lines if re.match(r"(\S+=\S+ )*bash launch/tpu_vm.sh ", line)]
    assert {re.search(r"tpu_vm.sh (?:--\S+ )*(\w+)", line)[1] for line in commands} == {
        *("create", "install", "run", "watch", "logs", "status", "stop", "fetch", "delete"),
    }
    for line in commands:
        wanted = line.replace("tpu_vm.sh", "tpu_vm.sh --dry_run", 1)
        done = subprocess.run(
            ["bash", "-euc", "\n".join([*exports, wanted])],
            cwd=ROOT,
            env={"PATH": str(bare), "HOME": "/home/me"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (line, done.stderr)
        assert "gcloud" in done.stdout


# --- against a gcloud that simulates --------------------------------------------------------------


class Cloud:
    """A simulated project: its folder, and a checkout whose script is called."""

    def __init__(self, folder):
        self.folder = folder / "cloud"
        self.checkout = folder / "checkout"
        bin_ = folder / "bin"
        for path in (self.folder, self.checkout / "launch", bin_):
            path.mkdir(parents=True)
        for name in ("setup.py", "constraints.txt", SCRIPT, "launch/tpu_worker.sh"):
            shutil.copy(ROOT / name, self.checkout / name)
        shutil.copy(ROOT / "launch/environment.sh", self.checkout / "launch")
        self.git("init", "-q")
        self.git("add", "--all")
        self.git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "one")
        executable(bin_ / "gcloud", FAKE_GCLOUD.format(python=sys.executable))
        executable(bin_ / "python3.13", FAKE_PYTHON)
        self.path = f"{bin_}:{os.environ['PATH']}"

    def git(self, *arguments):
        subprocess.run(["git", *arguments], cwd=self.checkout, check=True)

    def call(self, subcommand, *arguments):
        return call(
            *(*PLACE, TYPE, "--poll=0", subcommand, *arguments),
            cwd=self.checkout,
            path=self.path,
            FAKE=str(self.folder),
            HOME=str(self.folder),
            M3JAX_STOP_SECONDS="1",
        )

    def verbs(self):
        """What was done with the slice, looks left out, and repetitions."""
        calls = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        verbs = []
        for words in calls:
            verb = words[3]
            if verb == "ssh":
                verb = re.search(r"(?:worker.sh |^--command=(?!bash))(\w+)", words[-1])[1]
            if verb not in ("describe", "status", verbs[-1:]):
                verbs.append(verb)
        return verbs

    def command(self, text):
        """A command for the workers; `$FAKE/starts` has a line for each start on worker 0."""
        executable(
            self.folder / "command",
            "#!/usr/bin/env bash\nset -eu\n"
            '[[ "$HOSTNAME" == w-0 ]] && echo >>"$FAKE/starts"\n'
            'starts="$(wc -l <"$FAKE/starts" || echo 0)"\n' + text,
        )
        return "--", str(self.folder / "command")

    def starts(self):
        return len((self.folder / "starts").read_text().splitlines())


@pytest.fixture
def cloud(tmp_path):
    if shutil.which("setsid") is None or shutil.which("git") is None:
        pytest.skip("the workers' part needs setsid, as on Linux, and git")
    return Cloud(tmp_path)


ONCE = ["create", "scp", "mkdir", "start"]


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
        assert f"-c {home}/m3jax/constraints.txt -e {home}/m3jax[tpu]" in pip
    # Once more: the command has ended, so it is started again; it would resume and end at once.
    assert cloud.call("watch", *cloud.command("exit 0")).returncode == 0
    assert cloud.starts() == 2


@pytest.mark.parametrize("queued", [(), ("--queued",)])
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


@pytest.mark.parametrize("state", ["TERMINATED", "SUSPENDED", "FAILED", "STOPPED"])
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
        pass
    stopped = cloud.call("stop")
    assert stopped.stdout.count("exited 0") == 2, stopped.stdout + stopped.stderr
    log = cloud.call("logs", "--worker=all").stdout
    assert "w-0: saved\n" in log and "w-1: saved\n" in log
    stubborn = cloud.command('trap "" TERM; touch "$FAKE/stubborn-$HOSTNAME"; sleep 60')
    assert cloud.call("run", "--run=b", *stubborn).returncode == 0
    while not (cloud.folder / "stubborn-w-1").exists():
        pass
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
    assert calls[0] == "pip install -q --user --upgrade uv" and "[tpu]" in calls[2]


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
