"""The stages in Apache Beam, where it is installed: the same bytes as without it."""

import json
import random
import sys
from functools import partial

import pytest

from m3jax import config as configs
from m3jax.errors import TextError
from m3jax.text.cleaning.workers import BeamRunner, LocalRunner, Runner, WorkStage
from m3jax.text.prepare import prepare_text

IN_PROCESS = ["--runner=FnApiRunner"]


def _documents(folder, count=90):
    rng = random.Random(0)
    words = [a + b for a in "bdfgklmnprst" for b in ("an", "el", "iro", "uba")]
    texts = [" ".join(rng.choice(words) for _ in range(120)) for _ in range(count)]
    texts += [texts[4], "short"]
    rows = [json.dumps({"id": f"d{i}", "text": text}) for i, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("\n".join(rows[:50]))
    (folder / "b.jsonl").write_text("\n".join(rows[50:]))
    return f"{folder}/a.jsonl,{folder}/b.jsonl"


def _config():
    config = configs.default()
    config.text.vocabulary = config.model.vocabulary = 400
    config.text.validation_share, config.text.shuffle = 0.2, 3
    config.memory.reference_length = 32
    config.clean.enabled = True
    return config


def _snapshot(folder):
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.mark.parametrize(
    "options",
    [IN_PROCESS, [*IN_PROCESS, "--direct_num_workers=2", "--direct_running_mode=multi_threading"]],
    ids=["one worker", "two workers"],
)
@pytest.mark.filterwarnings("ignore")
def test_makes_the_same_bytes(options, tmp_path):
    pytest.importorskip("apache_beam", reason="pip install -e '.[prepare]', see CONTRIBUTING.md")
    documents, config = _documents(tmp_path), _config()
    runner = BeamRunner(options)
    assert isinstance(runner, Runner)
    for name, by in (("local", LocalRunner()), ("beam", runner)):
        prepare_text(config, tmp_path / name, documents, say=lambda _: None, runner=by)
    assert _snapshot(tmp_path / "beam") == _snapshot(tmp_path / "local")
    assert len(_snapshot(tmp_path / "beam")) > 20


@pytest.mark.filterwarnings("ignore")
def test_stages_wait_for_each_other_and_errors_keep_their_words(tmp_path):
    pytest.importorskip("apache_beam", reason="pip install -e '.[prepare]', see CONTRIBUTING.md")
    stages = [
        WorkStage("write", partial(list, range(7)), partial(_touch, tmp_path), _twice),
        WorkStage("see", partial(_seen, tmp_path), partial(_expect, 14), _once),
    ]
    BeamRunner(IN_PROCESS).run(stages)
    stages[1] = WorkStage("see", partial(_seen, tmp_path), partial(_expect, 15), _once)
    with pytest.raises(TextError, match="14 files; expected 15"):
        BeamRunner(IN_PROCESS).run(stages)


def test_without_beam_its_absence_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(TextError, match=r"pip install -c constraints-beam\.txt -e"):
        BeamRunner()


def _twice(unit):
    return [2 * unit, 2 * unit + 1]


def _once(unit):
    return [unit]


def _touch(folder, task):
    (folder / f"{task}.made").write_text("")


def _seen(folder):
    return [len(list(folder.glob("*.made")))]


def _expect(count, found):
    if found != count:
        raise TextError(f"{found} files; expected {count}")
