"""A simulated gcloud for tests of launch/tpu_vm.sh, and calls of the script.

The simulated gcloud keeps a slice of two workers as two folders; what is sent to a worker is really
executed there, by launch/tpu_worker.sh from the archive that `install` has sent.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import processes

ROOT = Path(__file__).parents[2]
SCRIPT = "launch/tpu_vm.sh"
TOOLS = (
    "awk bash cat cksum cp cut date dirname env git grep gzip mkdir mv rm sed sleep sort tail tar"
)
PLACE = ("--name=m3", "--zone=us-west4-a")
TYPE = "--type=v5litepod-256"

HARD = [
    ("python", "a b", "it's", 'say "hi"', "$HOME", "`id`", "*", "a;b|c&d", "\\", "", "ü", "~", "#"),
    ("echo", "'", "''", "a'b'c", "--flag=x y", "{a,b}", "!x", "$(id)", "tab\there", "line\nbreak"),
]

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
    environment = {**base, **environment}
    text = "y\n"  # nobody asks, nobody reads it
    return processes.call(command, text, inherit=False, cwd=cwd, env=environment)


def dry(bare, *arguments, **environment):
    done = call("--dry_run", *arguments, path=bare, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


class Cloud:
    """A simulated project: its folder, and a checkout whose script is called."""

    def __init__(self, folder):
        self.folder = folder / "cloud"
        self.checkout = folder / "checkout"
        bin_ = folder / "bin"
        for path in (self.folder, self.checkout / "launch", bin_):
            path.mkdir(parents=True)
        for name in (
            "setup.py",
            "constraints.txt",
            SCRIPT,
            "launch/tpu_worker.sh",
            "launch/tpu_commands.sh",
        ):
            shutil.copy(ROOT / name, self.checkout / name)
        shutil.copy(ROOT / "launch/environment.sh", self.checkout / "launch")
        self.git("init", "-q")
        self.git("add", "--all")
        self.git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "one")
        executable(bin_ / "gcloud", FAKE_GCLOUD.format(python=sys.executable))
        executable(bin_ / "python3.13", FAKE_PYTHON)
        self.path = f"{bin_}:{os.environ['PATH']}"

    def git(self, *arguments):
        processes.succeed(["git", *arguments], cwd=self.checkout)

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
