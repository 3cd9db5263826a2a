"""The launch scripts as a user calls them: real processes, a whole small run, and its mistakes."""

import functools
import json
import re
import runpy
from pathlib import Path

import processes
import pytest
from data.data_workdir import WORLD, write_text
from retrieval.encoders import write_encoder

from m3jax import cli
from m3jax.errors import InferenceError
from m3jax.inference.cli import Request, run
from m3jax.quickstart import people
from m3jax.retrieval.index import Index

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "launch").glob("*.py"))
SMALL = """
from m3jax.config import default, parse_options, validate


def get_config(options=""):
    stage = parse_options(options, stage=("warmup", "continual", "sft", "dpo"))["stage"]
    config = default()
    config.stage = stage
    config.model.layers, config.memory.layers = 2, 1
    config.model.hidden, config.model.head_dim, config.model.mlp_width = 16, 8, 24
    config.model.query_heads = config.model.kv_heads = 2
    config.model.vocabulary = config.text.vocabulary = 700
    config.model.prefix = "always"
    config.memory.source = "none" if stage == "warmup" else "precomputed"
    config.memory.reference_length, config.memory.kept_tokens = 9, 4
    config.memory.chunk_length, config.data.sequence_length = 10, 60
    config.text.validation_share = 0.2
    config.retrieval.shift, config.retrieval.candidates = 1, 8
    config.data.batch_size = config.evaluation.batch_size = 4
    config.evaluation.batches = 2
    config.train.steps, config.train.checkpoint_every, config.train.evaluate_every = 6, 3, 3
    config.train.log_every, config.optimizer.lr_warmup_steps = 2, 1
    if stage in ("sft", "dpo"):
        config.data.packing = "chats" if stage == "sft" else "pairs"
        config.train.epochs, config.optimizer.lr_warmup_share = 0.5, 0.1
        config.chat.user, config.chat.assistant = "\\nQ", "\\nA"
    return validate(config)
"""


def call(script, *arguments):
    script, *command = script.split()  # "evaluate losses"
    return processes.run_script(f"launch/{script}.py", *command, *arguments, devices=1)


def succeed(*arguments):
    done = call(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not re.search(r"^I\d{4} ", done.stderr, re.MULTILINE), "log lines of a library"
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_begins_with_a_command_and_names_every_flag(script):
    scope = runpy.run_path(str(ROOT / "launch" / f"{script}.py"))
    commands = scope["COMMANDS"]
    for name, command in commands.items():
        shown = cli.help_text(scope["__doc__"], commands, f"{script}.py", name)
        assert " ".join(("python", f"launch/{script}.py", name)).strip() in shown + scope["__doc__"]
        for flag in command.flags:
            assert f"--{flag.name}" in shown or f"--[no]{flag.name}" in shown
            assert flag.help.endswith(".") and len(flag.help.split()) > 2, flag.name
    overview = cli.help_text(scope["__doc__"], commands, f"{script}.py", "").splitlines()
    assert overview[2].strip().startswith(f"python launch/{script}.py")


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_a_process(script):
    done = call(script, "--help")
    assert done.returncode == 0 and "python launch/" in done.stdout and not done.stderr


@pytest.mark.slow
def test_a_run_from_text_to_a_table(tmp_path):
    tmp_path = tmp_path / "a [1] %#ü?*&'"  # names are names everywhere, not globs or URLs
    tmp_path.mkdir()
    config = tmp_path / "small.py"
    config.write_text(SMALL)
    documents, knowledge = write_text(tmp_path)
    workdir = tmp_path / "run"
    at = (f"--workdir={workdir}",)
    warmup, continual = f"--config={config}:warmup", f"--config={config}:continual"
    texts = f"--documents={documents}", f"--knowledge={knowledge}"

    missing = call("train", warmup, *at)
    assert missing.returncode == 2 and "prepare.py" in missing.stderr
    assert "Traceback" not in missing.stderr
    succeed("prepare", warmup, *at, *texts)
    succeed("train", warmup, *at)
    no_bank = call("train", continual, *at, f"--init_from={workdir}/warmup")
    assert no_bank.returncode == 2 and "write_bank.py" in no_bank.stderr
    succeed("write_bank", continual, *at)
    succeed("train", continual, *at, f"--init_from={workdir}/warmup")

    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"prompt": "pet of Nobody", "answer": " otter"}) + "\n")
    figures = tmp_path / "figures.json"
    asked = f"--questions={questions}", f"--shots={questions}", "--new_tokens=2"
    shown = succeed("evaluate questions", continual, *at, *asked, f"--json={figures}")
    report = json.loads(figures.read_text())
    assert (report["step"], report["questions"], report["shots"]) == (6, 1, 1)
    for condition in ("none", "text_found", "memory_found", "wrong"):
        assert f"({report['conditions'][condition]['nats']['low']:.3f} to" in shown
    known = json.loads(Path(knowledge).read_text().splitlines()[0])["text"].split()[0]
    both = [{"prompt": "pet of Nobody", "answer": answer} for answer in (f" {known}", " unicorn")]
    questions.write_text("\n".join(map(json.dumps, both)))
    cold = "--answerable", "--cold", f"--bank={tmp_path}", "--conditions=memory_found"
    shown = succeed("evaluate questions", continual, *at, *asked, *cold)
    assert "1 of 2 questions have an answer in a reference" in shown and ": 1 questions," in shown
    questions.write_text(json.dumps({"prompt": "pet of Nobody", "answer": ""}) + "\n")
    refused = call("evaluate questions", continual, *at, *asked)
    assert refused.returncode == 2 and "questions.jsonl:1: " in refused.stderr
    shown = succeed("evaluate losses", continual, *at, f"--json={figures}")
    report = json.loads(figures.read_text())
    assert report["shift"] == 1 and report["step"] == 6
    for mode in ("memory", "none", "wrong"):
        assert f"{report[f'loss_{mode}']:.4f}" in shown
    assert "of the references found" in shown and "were dropped" in shown
    leaks = succeed("evaluate leakage", continual, *at, "--against=validation")
    assert "| overlap |" in leaks
    assert (workdir / "report" / "leakage.png").read_bytes().startswith(b"\x89PNG")
    chosen = call("select_memory references", continual, *at, "--budget_bytes=9999", "--dry_run")
    if chosen.returncode:  # six steps of training may gain nothing from memories
        assert chosen.returncode == 2 and "no reference is expected to lower" in chosen.stderr
    else:
        assert "random - chosen" in chosen.stdout
    no_budget = call("select_memory references", continual, *at, "--budget_bytes=9")
    assert no_budget.returncode == 2 and "is less than one memory" in no_budget.stderr
    _generates(tmp_path, continual, workdir)
    again = succeed("train", continual, *at, f"--init_from={workdir}/warmup")
    assert "checkpoint" in again
    assert (workdir / "continual" / "loss.png").stat().st_size > 10_000


def _generates(folder, config, workdir):
    """Texts with their sources, from two versions of the knowledge and in every mode."""
    name = WORLD.unseen[0].name
    run_, written, page = f"--workdir={workdir}", folder / "texts.json", folder / "page.html"
    key = next(person for person in people.knowledge(WORLD.unseen[:1]))["id"]
    edited = succeed("edit_bank delete", config, run_, f"--keys={key}#0")
    assert "version 1" in edited
    flags = "--new_tokens=12", "--explain", "--by_head", f"--json={written}", f"--html={page}"
    versions = "--bank_version=0", "--bank_version=1"
    shown = succeed("generate", config, run_, f"--prompt=pet of {name}", *flags, *versions)
    assert "== version 0" in shown and "== version 1" in shown
    before, after = json.loads(written.read_text())
    assert f"pet of {name}{before['text']}" in shown
    own = next(source for source in before["sources"] if source["title"] == name)
    assert own["key"] in shown and own["text"] in page.read_text() and own["effect"] != 0
    assert own["key"] not in [source["key"] for source in after["sources"]]

    loaded = load_small(folder)
    asked = functools.partial(run, loaded("continual"), workdir, versions=[0])
    for mode in ("none", "cold", "rag"):
        (record,) = asked(Request([f"pet of {name}"], mode=mode, new_tokens=12, references=1))
        assert len(record["tokens"]) == 12
        assert bool(record["chunks"]) == (mode == "cold")
    long = "\n".join(person.text for person in WORLD.people[:20]) + f"\npet of {name}"
    (record,) = asked(Request([long], mode="long_context", new_tokens=12, window=20, cut=8))
    assert {source["text"] in long for source in record["sources"]} == {True}
    needles, figures = folder / "needles.jsonl", folder / "needle.json"
    person = WORLD.unseen[1]
    fields = {"needle": person.text, "prompt": f"pet of {person.name}", "answer": " otter"}
    needles.write_text(json.dumps(fields) + "\n")
    sizes = "--lengths=50,120", "--count=2", "--window=20", "--cut=8", f"--json={figures}"
    assert "| 120 | " in succeed("evaluate needle", config, run_, f"--needles={needles}", *sizes)
    assert json.loads(figures.read_text())["lengths"] == [50, 120]
    with pytest.raises(InferenceError, match="context of 60: .*--references"):
        asked(Request([f"pet of {name}"], mode="rag", new_tokens=40))
    with pytest.raises(InferenceError, match="there are no prompts"):
        asked(Request([]))
    with pytest.raises(InferenceError, match="--explain takes memories away"):
        asked(Request(["pet"], mode="none", explain=True))
    with pytest.raises(InferenceError, match="has not learned to read"):
        run(loaded("warmup"), workdir, Request(["pet"]), checkpoint=workdir / "warmup")


@pytest.mark.slow
def test_from_chats_to_answers(tmp_path):
    """SFT and DPO without memory, by their scripts, and a question to the result."""
    (tmp_path / "small.py").write_text(SMALL)
    documents, knowledge = write_text(tmp_path)
    at = (f"--workdir={tmp_path}/run", "--config.memory.source=none")
    config = f"--config={tmp_path}/small.py"
    succeed("prepare", config, *at, f"--documents={documents}", f"--knowledge={knowledge}")
    succeed("train", config, *at)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": ""}]}\n')
    refused = call("prepare chats", f"{config}:sft", *at, f"--chats={bad}")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert f"{bad}:1: turn 1 (user) is empty; give every turn some text" in refused.stderr
    people.write_jsonl(tmp_path / "chats.jsonl", people.chats(WORLD, 0, 60))
    people.write_jsonl(tmp_path / "pairs.jsonl", people.preferences(WORLD, 0, 60))
    for stage, before, name in (("sft", "warmup", "chats"), ("dpo", "sft", "pairs")):
        of = f"{config}:{stage}"
        unprepared = call("train", of, *at)
        assert unprepared.returncode == 2 and "prepare.py chats" in unprepared.stderr
        shown = succeed("prepare chats", of, *at, f"--chats={tmp_path}/{name}.jsonl")
        steps = re.search(r"0\.5 epochs at 4 rows: (\d+) steps", shown)[1]
        assert "% padding" in shown
        if stage == "dpo":
            aimless = call("train", of, *at)
            assert aimless.returncode == 2 and "--init_from=WORKDIR/sft" in aimless.stderr
        trained = succeed("train", of, *at, f"--init_from={tmp_path}/run/{before}")
        assert f"0.5 epochs are {steps} steps" in trained
        assert f"{stage}/checkpoints/{steps}" in trained
    assert "gain_chosen" in trained
    asked = tmp_path / "asked.jsonl"
    turns = [("user", "pet of Nobody"), ("assistant", "otter"), ("user", "food of Nobody")]
    asked.write_text(json.dumps({"messages": [{"role": r, "content": t} for r, t in turns]}) + "\n")
    flags = "--chat", "--mode=none", "--new_tokens=6"
    shown = succeed("generate", f"{config}:dpo", *at, *flags, f"--prompts={asked}")
    assert shown.startswith("food of Nobody\n→")
    empty = call("generate", f"{config}:dpo", *at, *flags, "--prompt= ")
    assert empty.returncode == 2 and "empty" in empty.stderr


def load_small(folder):
    """`get_config` of the file."""
    scope = {}
    exec((folder / "small.py").read_text(), scope)
    return scope["get_config"]


@pytest.mark.slow
def test_an_index_with_a_pretrained_encoder(tmp_path):
    (tmp_path / "small.py").write_text(SMALL)
    documents, _ = write_text(tmp_path)
    workdir, encoder = tmp_path / "run", tmp_path / "encoder"
    command = (
        "prepare",
        f"--config={tmp_path}/small.py",
        f"--workdir={workdir}",
        f"--documents={documents}",
        "--config.retrieval.embedder=bert",
        f"--config.retrieval.encoder={encoder}",
    )
    missing = call(*command)
    assert missing.returncode == 2 and not workdir.exists()  # before the text is prepared
    assert f"there is no folder {encoder}" in missing.stderr and "Traceback" not in missing.stderr
    write_encoder(encoder)
    succeed(*command)
    index = Index.open(workdir / "index")
    assert (index.embedder.name, index.dimension) == ("bert", 32)


@pytest.mark.slow
def test_references_without_the_questions_of_an_evaluation(tmp_path):
    (tmp_path / "small.py").write_text(SMALL)
    documents, knowledge = write_text(tmp_path)
    person = WORLD.unseen[0]
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question": person.text, "answer": "otter"}) + "\n")
    rules = ("words_min=0", "listed_max=1", "similarity=0", "question_words=4")
    command = (
        "prepare",
        f"--config={tmp_path}/small.py",
        f"--workdir={tmp_path}/run",
        f"--documents={documents}",
        f"--knowledge={knowledge}",
        "--config.knowledge.enabled",
        *(f"--config.knowledge.{rule}" for rule in rules),
    )
    for text, words in (("", "holds no examples"), ('{"a": 1}\n', "is of no known form")):
        (tmp_path / "bad.jsonl").write_text(text)
        refused = call(*command, f"--questions={tmp_path}/bad.jsonl")
        assert refused.returncode == 2 and words in refused.stderr
        assert "Traceback" not in refused.stderr and not (tmp_path / "run").exists()
    shown = succeed(*command, f"--questions={questions}", "--workers=1")
    assert "80 references cut, 1 dropped, 79 left" in shown
    report = json.loads((tmp_path / "run/report/knowledge/report.json").read_text())
    assert [s["id"] for s in report["samples"]["contamination"]] == [person.reference]
    assert "index: 79 references" in shown


@pytest.mark.slow
def test_mistakes_end_with_one_message(tmp_path):
    workdir = f"--workdir={tmp_path}"
    cases = {
        ("prepare", "--config=configs/wiki_small.py", workdir, "--documents=/nowhere"): "/nowhere",
        ("train", "--config=configs/wiki_small.py:stage=neither", workdir): "accepted",
        ("evaluate leakage", "--config=configs/wiki_small.py", workdir): "prepare.py",
        (
            "evaluate leakage",
            "--config=configs/wiki_small.py",
            workdir,
            "--threshold=2",
        ): "between 0 and 1",
    }
    for arguments, words in cases.items():
        done = call(*arguments)
        assert done.returncode != 0 and words in done.stderr, done.stderr[-2000:]
