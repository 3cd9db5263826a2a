"""launch/evaluate.py retrieval as a user calls it."""

import json
import subprocess
from pathlib import Path

import processes
import pytest
from data.data_workdir import write_text

ROOT = Path(__file__).parents[2]


def call(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    script, *command = script.split()  # "evaluate retrieval"
    return processes.run_script(f"launch/{script}.py", *command, *arguments)


@pytest.mark.slow
def test_prints_a_table_and_refuses_a_low_recall(tmp_path: Path) -> None:
    documents, knowledge = write_text(tmp_path)
    run = "--config=configs/wiki_small.py", f"--workdir={tmp_path / 'run'}"
    unprepared = call("evaluate retrieval", *run)
    assert unprepared.returncode == 2 and "Traceback" not in unprepared.stderr
    prepared = call("prepare", *run, f"--documents={documents}", f"--knowledge={knowledge}")
    assert prepared.returncode == 0, prepared.stderr[-2000:]

    file = tmp_path / "report.json"
    done = call(
        "evaluate retrieval", *run, "--sample=20", "--k=3", f"--json={file}", "--least_recall=1"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["recall"] == 1 and report["k"] == 3 and 0 < report["queries"] <= 20
    for words in ("recall at 3", "1.0000", "time over exact"):
        assert words in done.stdout

    questions = tmp_path / "questions.jsonl"
    text = Path(knowledge).read_text(encoding="utf-8").splitlines()[0]
    questions.write_text(json.dumps({"question": json.loads(text)["text"]}) + "\n")
    asked = call("evaluate retrieval", *run, f"--queries={questions}", f"--json={file}")
    assert asked.returncode == 0, asked.stderr[-2000:]
    assert json.loads(file.read_text(encoding="utf-8"))["queries"] == 1

    cases = {f"--queries={tmp_path}/none": "no such file", "--k=0": "--k", "--sample=0": "--samp"}
    for flag, words in cases.items():
        wrong = call("evaluate retrieval", *run, flag)
        assert wrong.returncode != 0 and words in wrong.stderr, wrong.stderr[-2000:]
