"""The leakage report: its figures against a plain recount, and what it refuses."""

import json

import numpy as np
import pytest
from data.data_workdir import tiny_config, write_text
from quick import slow_among

from m3jax.data.pipeline import open_pipeline
from m3jax.errors import LeakageError, TextError, UserError
from m3jax.evaluation.leakage import BINS, leakage, leakage_histogram, leakage_table
from m3jax.retrieval.build import build_index
from m3jax.retrieval.embed import make_embedder
from m3jax.text.overlap import overlap
from m3jax.text.prepare import prepare_text
from m3jax.text.references import References


@pytest.fixture(scope="module")
def config():
    return tiny_config(memory__source="online")


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("workdir")
    prepare_text(config, folder, *write_text(folder), say=lambda line: None)
    references = References(folder / "references")
    build_index(references, make_embedder(config), folder / "index", config)
    return folder


@pytest.fixture
def questions(tmp_path):
    def write(*records):
        path = tmp_path / "questions.jsonl"
        lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
        path.write_text("".join(line + "\n" for line in lines))
        return str(path)

    return write


@pytest.mark.parametrize("against", slow_among(["train", "validation"], ["train"]))
def test_figures_equal_a_recount(config, workdir, against):
    """Over all rows, from the pipeline's own rows, chunks and retriever."""
    pipeline = open_pipeline(config, workdir, split=against)
    values, first, emptied = [], [], []
    for row in range(len(pipeline.rows)):
        tokens = pipeline.rows[row].texts[0][0]
        texts = [pipeline.tokenizer.decode(tokens[low : low + 10]) for low in range(0, 60, 10)]
        for ids in pipeline.retriever.retrieve(texts, None, 8):
            found = [pipeline.references[i].tokens for i in ids[ids >= 0]]
            measured = [max(overlap(tokens, r), overlap(r, tokens)) for r in found]
            values += measured
            first += measured[:1]
            emptied += [min(measured) > 0.4] if measured else []
    report = leakage(config, workdir, against=against, sample=10**6, threshold=0.4)
    assert report["pairs"] == len(values) and report["queries"] == len(first)
    assert report["texts"] == len(pipeline.rows)
    above = {name: np.mean(np.array(values) > limit) for name, limit in LIMITS.items()}
    assert report["above"] == pytest.approx(above) and 0 < above["0.4"] < 1
    assert report["quantiles"]["0.9"] == pytest.approx(np.quantile(values, 0.9))
    assert report["queries_leaking"] == np.mean(np.array(first) > 0.4)
    assert report["queries_emptied"] == np.mean(emptied)
    np.testing.assert_array_equal(report["histogram"], np.histogram(values, BINS, (0, 1))[0])
    assert report["dropped"][0]["overlap"] == max(values)
    kept = max(value for value in values if value <= 0.4)
    assert report["kept"][0]["overlap"] == kept


LIMITS = {"0.4": 0.4, "0.667": 2 / 3, "0.9": 0.9}


def test_a_sample_repeats_and_its_examples_are_different_references(config, workdir):
    report = leakage(config, workdir, sample=5)
    assert report["texts"] == 5 and report == leakage(config, workdir, sample=5)
    for kind in ("dropped", "kept"):
        overlaps = [example["overlap"] for example in report[kind]]
        titles = {example["title"] for example in report[kind]}
        assert overlaps == sorted(overlaps, reverse=True) and len(titles) == len(overlaps)
        assert all((value > 0.9) == (kind == "dropped") for value in overlaps)
    other = leakage(tiny_config(memory__source="online", seed=5), workdir, sample=5)
    assert other["histogram"] != report["histogram"]


def test_table_and_picture_show_the_figures(config, workdir, tmp_path):
    report = leakage(config, workdir, sample=8, threshold=0.5)
    shown = leakage_table(report)
    assert f"{report['above']['0.5']:.2%} above 0.5" in shown
    assert f"{report['quantiles']['0.5']:.3f}" in shown
    for example in report["dropped"] + report["kept"]:
        assert example["key"] in shown and example["reference"].split()[0] in shown
    json.dumps(report)
    leakage_histogram(report, tmp_path / "new" / "leakage.png")
    assert (tmp_path / "new" / "leakage.png").read_bytes().startswith(b"\x89PNG")


def test_a_question_leaks_into_a_reference_that_contains_it(config, workdir, questions):
    """Though the reference is longer, and its overlap with the question therefore small."""
    reference = References(workdir / "references")[0]
    part = " ".join(reference.text.split()[:4])
    assert part != reference.text.strip()
    for field in ("prompt", "question"):
        report = leakage(config, workdir, against=questions({field: part, "answer": "x"}))
        assert report["dropped"][0]["overlap"] == 1.0
        assert report["dropped"][0]["name"] == "questions.jsonl:1"
    fewer = leakage(config, workdir, against=questions(*[{"prompt": part}] * 9), sample=4)
    assert fewer["texts"] == 4


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_thresholds_out_of_range_are_refused(config, workdir, threshold):
    with pytest.raises(LeakageError, match="threshold = .*between 0 and 1"):
        leakage(config, workdir, threshold=threshold)


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (["no json"], "questions.jsonl:1: not valid JSON"),
        ([{"prompt": "a"}, {"text": "b"}], "questions.jsonl:2: .*`prompt` or `question`"),
        ([["prompt"]], "questions.jsonl:1: a JSON list; expected"),
        ([{"prompt": 3}], "questions.jsonl:1: expected"),
        ([], "holds no question"),
        ([{"prompt": ""}], "questions.jsonl:1: .*an empty text"),
        ([{"prompt": "a", "question": "b"}], "it has 'prompt' and 'question'"),
        ([{"prompt": "§§§"}], "no reference was found for any of 1 texts"),
    ],
)
def test_unusable_questions_are_refused(config, workdir, questions, records, words):
    with pytest.raises(UserError, match=words):
        leakage(config, workdir, against=questions(*records))


def test_other_mistakes_name_the_remedy(config, workdir, tmp_path):
    with pytest.raises(LeakageError, match="give 'train', 'validation' or a .jsonl"):
        leakage(config, workdir, against="test")
    with pytest.raises(LeakageError, match="at least 1"):
        leakage(config, workdir, sample=0)
    with pytest.raises(TextError, match="prepare.py"):
        leakage(config, tmp_path)
    long = tiny_config(memory__source="online", data__sequence_length=10**6)
    with pytest.raises(TextError, match="too few for one row"):
        leakage(long, workdir)
