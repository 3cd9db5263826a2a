"""Preparing chats and pairs: what is kept, what is left out and told, and what is refused."""

import json

import pytest

from m3jax.config import default, validate
from m3jax.errors import TextError
from m3jax.text.chat.corpus import describe, prepare_chats
from m3jax.text.corpus import Corpus
from m3jax.text.tokenizer import Tokenizer


def config_of(packing="chats", share=0.5, bad=0.9, length=48):
    config = default()
    config.data.packing, config.data.sequence_length = packing, length
    config.text.validation_share, config.chat.bad_share = share, bad
    config.memory.chunk_length, config.memory.dropout = 4, 0.0
    config.retrieval.ids = "stored"
    return validate(config)


@pytest.fixture
def workdir(tmp_path):
    text = "\nUser: question number 0 1 2 3 4\nAssistant: answer"
    Tokenizer.train([text] * 9, 400, 2).save(tmp_path / "tokenizer")
    return tmp_path


def chat(number, rounds=1, **more):
    turns = [("user", f"question {number}"), ("assistant", "answer")] * rounds
    return {"messages": [{"role": r, "content": t} | more for r, t in turns]}


def write(folder, *records, name="chats.jsonl"):
    lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
    (folder / name).write_text("\n".join(lines) + "\n")
    return str(folder / name)


def test_bad_lines_are_counted_with_samples_and_long_chats_lose_rounds(workdir):
    long = {"prompt": "question", "response": "answer " * 60}
    spec = write(workdir, *[chat(n) for n in range(20)], chat(1, 7), "{", chat(2, 9), long, "{")
    report, kept = prepare_chats(config_of(), workdir, spec)
    assert not kept and report["read"] == 25 and report["shortened"] == 1
    assert report["train/chats"] + report["validation/chats"] == 21
    assert {r: e["count"] for r, e in report["left out"].items()} == {
        "json": 2,
        "length": 1,
        "rounds": 1,
    }
    assert f"{spec}:22" in report["left out"]["json"]["samples"][0]
    (sample,) = report["left out"]["length"]["samples"]
    assert f"{spec}:24: the first answer ends after 69 tokens" in sample and "a row of 48" in sample
    assert report["rounds"] == {"1": 20, "4": 1}  # of seven rounds of 11 tokens 48 hold four
    assert f"left out (json): 2, for example {spec}:22" in describe(report)
    longest = max(
        int(Corpus(workdir / "chats" / split).lengths.max()) for split in ("train", "validation")
    )
    assert longest <= 49
    again, kept = prepare_chats(config_of(), workdir, spec)
    assert kept and again == report
    with pytest.raises(TextError, match=r"other inputs: data\.sequence_length"):
        prepare_chats(config_of(length=52), workdir, spec)


def test_too_many_bad_lines_are_refused_once(workdir):
    spec = write(workdir, *[chat(n) for n in range(20)], "{", chat(3, 9))
    with pytest.raises(TextError) as caught:
        prepare_chats(config_of(bad=0.05), workdir, spec)
    message = str(caught.value)
    assert "2 of 22 chats cannot be used (1 json, 1 rounds)" in message
    assert f"{spec}:21: not valid JSON" in message and f"{spec}:22: 9 rounds" in message
    assert "config.chat.bad_share = 0.05" in message
    assert not (workdir / "chats" / "inputs.json").exists()
    prepare_chats(config_of(bad=0.1), workdir, spec)


def test_empty_and_one_sided_inputs_are_refused(workdir):
    with pytest.raises(TextError, match="no chats in"):
        prepare_chats(config_of(), workdir, write(workdir, ""))
    with pytest.raises(TextError, match=r"validation_share = 0\.5 leaves nothing for"):
        prepare_chats(config_of(), workdir, write(workdir, chat(1)))
    with pytest.raises(TextError, match="chats are prepared for a stage with"):
        prepare_chats(config_of("document"), workdir, "x")


def test_the_same_bytes_again_and_pairs_are_neighbours(workdir, tmp_path_factory):
    records = [
        {"prompt": f"question {n}", "chosen": "answer 1", "rejected": "answer"} for n in range(9)
    ]
    equal = {"prompt": "question", "chosen": "answer", "rejected": "answer"}
    spec = write(workdir, *records, equal, name="pairs.jsonl")
    config = config_of("pairs")
    report, _ = prepare_chats(config, workdir, spec)
    assert report["left out"]["equal"]["count"] == 1
    files = {
        path.relative_to(workdir): path.read_bytes() for path in sorted(workdir.rglob("pairs/*/*"))
    }
    (workdir / "pairs" / "inputs.json").unlink()  # as after a kill
    prepare_chats(config, workdir, spec)
    for path, data in files.items():
        assert (workdir / path).read_bytes() == data
    corpus = Corpus(workdir / "pairs" / "train")
    assert len(corpus) % 2 == 0
    ids = [document.id for document in corpus]
    for chosen, rejected in zip(ids[::2], ids[1::2], strict=True):
        assert chosen.removesuffix("/chosen") == rejected.removesuffix("/rejected")
    assert corpus[0].weights.sum() == 3 and corpus[1].weights.sum() == 2  # answers with `</s>`


def test_references_of_turns_are_those_of_chunks(workdir):
    spec = write(workdir, *[chat(n, 2, reference=f"key-{n}") for n in range(8)])
    prepare_chats(config_of(), workdir, spec)
    corpus = Corpus(workdir / "chats" / "train")
    for document in corpus:
        assert len(document.references) == -(-(len(document.tokens) - 1) // 4)
        assert set(document.references) == {f"key-{int(document.id.split(':')[1]) - 1}"}
