"""Sweeps: what entries share, what is refused, the table, the commands for a pod."""

from pathlib import Path
from typing import Any

import pytest

from m3jax.errors import SweepError
from m3jax.files import write_sealed
from m3jax.memory.binding import layout_of
from m3jax.sweep.plan import launch_lines, plan_sweep
from m3jax.sweep.run import BEGIN, END, as_json, finish, insert, sweep_table
from m3jax.sweep.spec import DATA_PARTS, Entry, Sweep, SweepRun, chosen, load_sweep

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users call the script: configs are named from here, and imported from here."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


def make(*entries: Entry, **more: Any) -> Sweep:
    more = {"prepare": lambda config, folder, knowledge: None, **more}
    return Sweep("configs/quickstart.py", entries, **more)


def planned(*entries: Entry, workdir: str = "/somewhere", **more: Any) -> list[SweepRun]:
    return plan_sweep(make(*entries, **more), workdir)


KEPT = {"memory.kept_tokens": 4}
COUNTS = "0:1+2+0+9"


# -- what is shared


def test_what_is_equal_is_shared() -> None:
    a, kept, rate, layers, stored = planned(
        Entry("a"),
        Entry("kept", KEPT),
        Entry("rate", {"continual:optimizer.learning_rate": 1e-4}),
        Entry("layers", {"memory.layers": 4}),
        Entry("stored", read={"writer.compression": "int8"}),
    )
    for other in (kept, rate, layers, stored):
        assert other.stages[0] == a.stages[0]
    assert [run.stages[1].config.memory.kept_tokens for run in (a, kept)] == [8, 4]
    assert kept.stages[0].config.memory.kept_tokens == 8  # warmup does not read it
    assert layers.stages[1].config.memory.layers == 4
    assert stored.stages == a.stages and stored.key != a.key
    assert stored.bank is not None and a.bank is None
    banks = [run.stages[1].bank for run in (a, kept, rate, layers)]
    assert banks[2] == banks[0] and len(set(banks)) == 3 and stored.bank not in banks
    folders = [run.stages[1].folder for run in (a, kept, rate, layers)]
    assert len(set(folders)) == 4


def test_entries_whose_memories_differ_share_no_bank() -> None:
    """Every field of the section `memory` that a bank states gives it another name."""
    changes: dict[str, Any] = {
        "memory.heads": "0:1",
        "memory.first_layer": 1,
        "memory.layers": 1,
        "memory.kept_tokens": 4,
        "memory.selection": "approximate",
        "memory.counts": COUNTS,
        "memory.dtype": "bfloat16",
        "memory.window": 2,
        "memory.dropout": 0.5,
    }
    copy: dict[str, Any] = {"memory.selection": "reconstruction"}
    base, *runs = planned(
        Entry("base"),
        Entry("copy", copy),
        Entry("mixture", {**copy, "memory.each": 1}),
        *(Entry(p, {p: v}) for p, v in changes.items()),
    )
    layouts = [layout_of(run.stages[1].config, (1, 2)) for run in (base, *runs)]
    banks = [run.stages[1].bank for run in (base, *runs)]
    assert [other == layouts[0] for other in layouts[1:]] == [False] * 9 + [True] * 2
    assert [other == banks[0] for other in banks[1:]] == [False] * 9 + [True] * 2
    assert len(set(banks)) == 10


def test_seeds_models_and_depths_are_not_shared() -> None:
    deep = {"model.layers": 2, "memory.layers": 1}
    a, wide, flat, other = planned(
        Entry("a"), Entry("wide", {"model.mlp_width": 64}), Entry("flat", deep), seeds=(3,)
    ) + planned(Entry("a"), seeds=(4,))
    assert len({run.stages[0].folder for run in (a, wide, flat, other)}) == 4
    assert a.stages[0].data.folder != other.stages[0].data.folder
    assert a.stages[0].data == wide.stages[0].data == flat.stages[0].data
    assert flat.stages[0].config.memory.layers == 1  # two memory layers would be the whole model
    assert [run.seed for run in (a, other)] == [3, 4]
    assert a.stages[1].config.seed == 3


def test_a_changed_entry_has_another_result_and_a_renamed_one_the_same() -> None:
    (before,), (after,), (renamed,) = (
        planned(entry) for entry in (Entry("a"), Entry("a", KEPT), Entry("b"))
    )
    assert before.key != after.key and before.key == renamed.key
    (moved,) = planned(Entry("a"), workdir="/elsewhere")
    assert moved.key == before.key
    (asked,) = planned(Entry("a"), questions="questions.jsonl")
    assert asked.key != before.key


def test_encoded_in_the_step_is_measured_with_a_bank_of_its_own_writer() -> None:
    online, scratch, context = planned(
        Entry("online", {"continual:memory.source": "online"}),
        Entry("scratch", stages=("scratch",)),
        Entry("context", {"writer.document_context": True}, knowledge="documents"),
    )
    assert online.stages[1].bank is None and online.bank is not None
    assert online.read is not None and online.read.memory.source == "precomputed"
    assert len(scratch.stages) == 1 and scratch.stages[0].before is None
    assert scratch.bank not in (None, online.bank)
    # The warmup reads no references: another knowledge base is no other warmup.
    assert context.stages[0] == online.stages[0]
    assert context.stages[1].data.folder.name.startswith("seed-0-documents-")


# -- what is refused


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (Entry("x", {"memory.kept": 4}), "config.memory.kept is not a field"),
        (Entry("x", {"modle.layers": 4}), "config.modle.layers is not a field"),
        (Entry("x", {"memory.kept_tokens": "4"}), "expected int"),
        (Entry("x", {"memory.kept_tokens": 33}), "at most memory.reference_length = 32"),
        (Entry("x", {"text.vocabulary": 900}), "decided when the data is prepared"),
        (Entry("x", {"retrieval.embedder": "model"}), "decided when the data is prepared"),
        (Entry("x", {"scratch:train.steps": 4}), "a stage that the entry has not"),
        (Entry("x", {":memory.kept_tokens": 4}), "a stage that the entry has not"),
        (Entry("x", {"continual:seed": 4}), "config.seed is not an entry's to change"),
        (Entry("x", options="stage=never"), "unknown or ambiguous"),
        (Entry("x", stages=("continual",)), "no checkpoint that could write"),
        (Entry("x", stages=("warmup", "warmup")), "each stage once"),
    ],
)
def test_an_entry_that_cannot_work_is_refused_alone(entry: Entry, words: str) -> None:
    good, bad = planned(Entry("good"), entry)
    assert words in bad.refused and not bad.stages and not good.refused
    found = bad.outcome()
    assert found is not None and words in found["error"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("get_sweep = 4", "has no function get_sweep"),
        ("def get_sweep(): return 5", "has no function get_sweep"),
        ("{}def get_sweep(): return Sweep('c', [])", "no entries or no seeds"),
        (
            "{}def get_sweep(): return Sweep('c', [Entry('a'), Entry('a')])",
            "2 entries have the name 'a'",
        ),
        ("{}def get_sweep(): return Sweep('c', [Entry('A b')])", "may only have lowercase"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "sweep.py"
    file.write_text(text.format("from m3jax.sweep.spec import DATA_PARTS, Entry, Sweep\n"))
    with pytest.raises(SweepError, match=words):
        load_sweep(file)
    with pytest.raises(SweepError, match="there is no sweep"):
        load_sweep(tmp_path / "other.py")


def test_data_and_choices_are_checked() -> None:
    with pytest.raises(SweepError, match="leave out --data"):
        plan_sweep(make(Entry("a")), "/somewhere", "runs/wiki")
    with pytest.raises(SweepError, match="name a workdir of launch/prepare.py with --data"):
        planned(Entry("a"), prepare=None)
    runs = planned(Entry("a"), Entry("b"), seeds=(0, 7))
    assert [run.name for run in chosen(runs, ["b"], ["7"])] == ["b@7"]
    with pytest.raises(SweepError, match="no entry or seed 'c'; it has a, b"):
        chosen(runs, ["c"], None)


# -- shipped sweeps


@pytest.mark.slow
def test_the_ablations_of_the_quickstart_share_one_warmup() -> None:
    sweep = load_sweep("configs/sweeps/quickstart.py")
    runs = plan_sweep(sweep, "/somewhere")
    assert not [run.refused for run in runs if run.refused]
    assert {run.seed for run in runs} == {0, 1, 2}
    runs = chosen(runs, None, ["0"])
    warmups = [stage.folder for run in runs for stage in run.stages if stage.before is None]
    shapes = [run for run in runs if run.entry.name.startswith("shape-")]
    assert len(set(warmups)) == 1 + len(shapes) + 1  # and from-scratch
    assert warmups.count(warmups[0]) == len(runs) - len(shapes) - 1
    for run in shapes:
        model = run.stages[1].config.model
        size = model.layers * (4 * model.hidden * model.query_heads * model.head_dim)
        size += model.layers * 3 * model.hidden * model.mlp_width
        assert 0.88e6 < size < 0.97e6
    by_name = {run.entry.name: run for run in runs}
    assert by_name["int8"].stages == by_name["baseline"].stages
    assert by_name["shift-0"].stages[1].bank == by_name["baseline"].stages[1].bank
    assert by_name["shift-0"].read is not None
    assert by_name["shift-0"].read.retrieval.ids == "stored"


def test_the_shapes_of_the_paper_are_planned_for_a_pod(tmp_path: Path) -> None:
    sweep = load_sweep("configs/sweeps/shapes.py")
    runs = plan_sweep(sweep, "/mnt/sweep", tmp_path)
    assert not any(run.refused for run in runs) and len(runs) == 7
    lines = list(launch_lines(sweep, runs[:2], "python launch/sweep.py"))
    assert lines[0] == "python launch/sweep.py --prepare_only" and len(lines) == 4
    folder = runs[1].stages[0].folder
    assert lines[2] == (
        f"bash launch/tpu_vm.sh watch --run={folder.name} -- python launch/train.py"
        " --config=configs/ablation.py:stage=warmup,base=memory3_2b,shape=64x32x80"
        f" --workdir={folder} --distributed"
    )


def test_launch_lines_name_what_is_shared_once() -> None:
    sweep = make(Entry("a"), Entry("kept", KEPT))
    runs = plan_sweep(sweep, "/mnt/s")
    lines = list(launch_lines(sweep, runs, "own"))
    warmup, first, second = (stage.folder for stage in (*runs[0].stages, runs[1].stages[1]))
    banks = [run.stages[1].bank for run in runs]
    watch, config = "bash launch/tpu_vm.sh watch --run", "--config=configs/quickstart.py:stage"
    writer = f"--checkpoint={warmup}/warmup"
    start = f"--init_from={warmup}/warmup --distributed"
    kept = "--config.memory.kept_tokens=4"
    assert banks[0] and banks[1]
    assert lines == [
        "own --prepare_only",
        f"{watch}={warmup.name} -- python launch/train.py {config}=warmup --workdir={warmup}"
        " --distributed",
        f"{watch}=bank-{banks[0].name} -- python launch/write_bank.py {config}=continual"
        f" --workdir={first} {writer} --bank={banks[0]} --distributed",
        f"{watch}={first.name} -- python launch/train.py {config}=continual --workdir={first}"
        f" {start}",
        f"{watch}=bank-{banks[1].name} -- python launch/write_bank.py {config}=continual {kept}"
        f" --workdir={second} {writer} --bank={banks[1]} --distributed",
        f"{watch}={second.name} -- python launch/train.py {config}=continual {kept}"
        f" --workdir={second} {start}",
        "own",
    ]


# -- results


# -- data
def data_of(folder: Path, corpus: str) -> Path:
    """A folder with the identities of prepared parts."""
    for part in DATA_PARTS[:5]:
        name = corpus if part == "corpus/train" else part
        write_sealed(folder / part / "manifest.json", {"fingerprint": name})
    return folder


def test_given_data_is_named_by_its_content_and_not_by_its_path(tmp_path: Path) -> None:
    """Other documents at the same path make other stages, banks and results."""
    sweep = make(Entry("a"), prepare=None)
    (before,) = plan_sweep(sweep, tmp_path, data_of(tmp_path / "data", "first"))
    (moved,) = plan_sweep(sweep, tmp_path, data_of(tmp_path / "moved", "first"))
    (after,) = plan_sweep(sweep, tmp_path, data_of(tmp_path / "data", "second"))
    assert before.key == moved.key != after.key
    folders = [
        {path for stage in run.stages for path in (stage.folder, stage.bank)}
        for run in (before, moved, after)
    ]
    assert folders[0] == folders[1] and folders[0] & folders[2] == {None}
    for part in DATA_PARTS:  # none of them is left out
        write_sealed(tmp_path / "data" / part / "manifest.json", {"fingerprint": "another"})
        (other,) = plan_sweep(sweep, tmp_path, tmp_path / "data")
        assert other.key != after.key, part
        after = other


def test_figures_of_data_that_was_made_anew_do_not_count(tmp_path: Path) -> None:
    """Data that a sweep prepares has the same name, whatever its function makes."""
    (run,) = planned(Entry("a"), workdir=str(tmp_path), questions="questions.jsonl")
    data = data_of(run.stages[-1].data.folder, "first")
    (data / "questions.jsonl").write_text("first")
    content = {"key": run.key, "figures": {}, "data": run.content}
    write_sealed(run.result, content)
    assert run.outcome() == content
    (data / "questions.jsonl").write_text("second")
    assert run.outcome() is None
    (data / "questions.jsonl").write_text("first")
    assert run.outcome() == content
    data_of(data, "second")
    assert run.outcome() is None


@pytest.fixture
def measured(tmp_path: Path) -> list[SweepRun]:
    """Four entries with two seeds: one whole, one half, one failed, one refused."""
    runs = planned(
        Entry("a", group="first"),
        Entry("b", KEPT, group="second"),
        Entry("c", {"memory.kept_tokens": 2}, group="second"),
        Entry("d", {"memory.kept_tokens": 99}, group="second"),
        workdir=str(tmp_path),
        seeds=(0, 1),
    )
    figures = {"right_none": 0.0625, "loss_memory": 0.5, "memory_bytes": 2048, "flops": 2.5e12}
    told = {
        "a@0": {"figures": {**figures, "right_memory": 0.9}},
        "a@1": {"figures": {**figures, "right_memory": 0.8, "loss_memory": 0.25}},
        "b@1": {"figures": {"right_memory": 1.0, "loss_memory": 1.0}},
        "c@0": {"error": "ended by SIGKILL (out of memory?)"},
    }
    for run in runs:
        if run.name in told:
            write_sealed(run.result, {"key": run.key, "name": run.name, **told[run.name]})
    return runs


def test_table_of_known_figures(measured: list[SweepRun]) -> None:
    refused = "config.memory.kept_tokens = 99: a reference has at most memory.reference_length = 32"
    assert sweep_table(measured).splitlines() == [
        "|  | right answers with memory | without | loss with memory | bytes a memory |"
        " training, TFLOP | seeds |",
        "|---|---|---|---|---|---|---|",
        "| **first** | | | | | | |",
        "| a | 0.850 (0.800…0.900) | 0.062 | 0.375 (0.250…0.500) | 2,048 | 2.50 | 2 |",
        "| **second** | | | | | | |",
        "| b | 1.000 | – | 1.000 | – | – | 1 |",
        "| c | – | – | – | – | – | failed |",
        "| d | – | – | – | – | – | failed |",
        "",
        "Failed:",
        "",
        "* c, seed 0: ended by SIGKILL (out of memory?)",
        f"* d, seed 0: {refused} tokens",
        f"* d, seed 1: {refused} tokens",
        "",
        "Not run with seed 0: b.",
        "",
        "Not run with seed 1: c.",
    ]


def test_a_result_of_another_config_does_not_count(measured: list[SweepRun]) -> None:
    first = measured[0]
    assert first.outcome() is not None
    (changed,) = chosen(planned(Entry("a", KEPT), workdir=str(first.result.parents[1])), None, None)
    assert changed.result == first.result and changed.outcome() is None
    first.result.write_bytes(first.result.read_bytes()[:-9])
    assert first.outcome() is None


def test_report_goes_where_it_is_asked_to(measured: list[SweepRun], tmp_path: Path) -> None:
    page, picture = tmp_path / "page.md", tmp_path / "docs" / "sweep.png"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    told = finish(measured, tmp_path / "report", str(page), str(picture))
    assert told.startswith(sweep_table(measured))
    assert page.read_text() == f"before\n{BEGIN}\n{sweep_table(measured)}\n{END}\nafter\n"
    assert (tmp_path / "report" / "table.md").read_text() == sweep_table(measured) + "\n"
    assert (tmp_path / "report" / "sweep.json").read_text() == as_json(measured)
    assert '"right_memory": 0.9' in as_json(measured)
    assert picture.read_bytes() == (tmp_path / "report" / "sweep.png").read_bytes()
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    insert(tmp_path / "new.md", "text")
    assert (tmp_path / "new.md").read_text() == f"{BEGIN}\ntext\n{END}\n"
