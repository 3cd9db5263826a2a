"""launch/tpu_vm.sh: the exact commands of a dry run, and mistakes in a call."""

import re
import shlex

import processes
import pytest
from launch.tpu_cloud import HARD, PLACE, ROOT, SCRIPT, TYPE, call, dry, executable

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
    "gcloud storage cp 'gs://b/run/warmup/metrics.jsonl*' runs/m3/warmup/",
    "gcloud storage cp 'gs://b/run/warmup/*.png' runs/m3/warmup/",
    "gcloud storage cp --recursive gs://b/run/report runs/m3/",
]
SCP = f"{GCLOUD} tpu-vm scp"
HERE = "--zone=us-west4-a --worker=0 --quiet"
DISK = [
    "mkdir -p 'my reports/continual'",
    f"{SCP} 'm3:m3jax/runs/x/continual/metrics.jsonl*' 'my reports/continual/' {HERE}",
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
        (("fetch", "--workdir=~/runs/x", "--stages=continual", "--to=my reports"),
         [line.replace("m3jax/runs/x", "runs/x") for line in DISK]),
        (("fetch", "--workdir=runs/x", "--stages=continual", "--to=~/my reports"),
         [line.replace("my reports", "/home/me/my reports") for line in DISK]),
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


@pytest.mark.parametrize("command", HARD)
def test_commands_survive_both_shells(bare, command):
    (line,) = dry(bare, *PLACE, "run", "--", *command)
    if "\n" not in "".join(command):
        sent = next(word for word in shlex.split(line) if word.startswith("--command="))
        assert shlex.split(sent[len("--command=") :])[4:] == list(command)
    shown = processes.call(["bash", "-c", f"printf '%s\\0' {line}"])
    sent = next(w for w in shown.stdout.split("\0") if w.startswith("--command="))[10:]
    there = processes.call(["bash", "-c", f"printf '%s\\0' {sent}"])
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
        (
            (*PLACE, "fetch", "--workdir=x", "--to=gs://b/x"),
            "--to is gs://b/x; name a local folder",
        ),
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
        done = processes.call(
            ["bash", "-euc", "\n".join([*exports, wanted])],
            inherit=False,
            env={"PATH": bare, "HOME": "/home/me"},
        )
        assert done.returncode == 0, (line, done.stderr)
        assert "gcloud" in done.stdout
