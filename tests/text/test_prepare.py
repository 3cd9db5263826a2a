"""Preparation of a workdir: parts, resuming, and refusing what belongs to another run."""

import json

import pytest

from m3jax import config as configs
from m3jax.errors import TextError
from m3jax.text import prepare
from m3jax.text.corpus import Corpus
from m3jax.text.documents import is_validation, read_documents
from m3jax.text.prepare import prepare_text
from m3jax.text.references import References
from m3jax.text.tokenizer import Tokenizer
from m3jax.workdir import INPUTS, make_part


@pytest.fixture
def documents(tmp_path):
    path = tmp_path / "documents.jsonl"
    lines = [{"id": f"d{i}", "text": f"Anna number {i} likes cats. " * 9} for i in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def config():
    config = configs.default()
    config.text.vocabulary = config.model.vocabulary = 300
    config.text.validation_share = 0.2
    config.text.shards = 3
    config.memory.reference_length = 32
    return config


def _snapshot(folder):
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_makes_all_parts(config, documents, tmp_path):
    said = []
    prepare_text(config, tmp_path / "w", documents, say=said.append)
    assert [line.split(":")[0] for line in said] == [
        "tokenizer", "corpus/validation", "corpus/train", "references",
    ]  # fmt: skip
    assert all(line.endswith("(made)") for line in said) and "bytes per token" in said[2]
    all_documents = list(read_documents(documents))
    train = Corpus(tmp_path / "w/corpus/train")
    validation = Corpus(tmp_path / "w/corpus/validation")
    assert {d.id for d in validation} == {d.id for d in all_documents if is_validation(d, 0.2)}
    assert [d.id for d in train] == [d.id for d in all_documents if not is_validation(d, 0.2)]
    references = References(tmp_path / "w/references")
    assert {key.split("#")[0] for key in references.live_keys()} == {d.id for d in all_documents}
    fingerprint = Tokenizer.load(tmp_path / "w/tokenizer").fingerprint
    parts = (train, validation, references)
    assert {part.tokenizer_fingerprint for part in parts} == {fingerprint}
    assert references.length == 32


def test_finished_parts_are_kept_and_unfinished_ones_made_again(
    config, documents, tmp_path, monkeypatch
):
    workdir = tmp_path / "w"
    prepare_text(config, workdir, documents, say=lambda _: None)
    whole = _snapshot(workdir)
    (workdir / "corpus/train" / INPUTS).unlink()
    (workdir / "corpus/train/manifest.json").unlink()
    (workdir / "corpus/train/records-00001.array_record.tmp").write_bytes(b"torn")
    said = []
    prepare_text(config, workdir, documents, say=said.append)
    assert [line.endswith("kept)") for line in said] == [True, True, False, True]
    assert _snapshot(workdir) == whole

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(prepare, "write_references", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_text(config, tmp_path / "v", documents, say=lambda _: None)
    said.clear()
    prepare_text(config, tmp_path / "v", documents, say=said.append)
    assert [line.endswith("kept)") for line in said] == [True, True, True, False]
    assert _snapshot(tmp_path / "v") == whole


def test_workdir_of_other_inputs_is_refused(config, documents, tmp_path):
    workdir = tmp_path / "w"
    prepare_text(config, workdir, documents, say=lambda _: None)
    config.text.vocabulary = 280
    with pytest.raises(TextError, match=r"tokenizer was made from other.*text\.vocabulary was 300"):
        prepare_text(config, workdir, documents)
    config.text.vocabulary = 300
    with pytest.raises(TextError, match="limit was None, is now 50"):
        prepare_text(config, workdir, documents, limit=50)
    config.memory.reference_length = 16
    with pytest.raises(TextError, match=r"references was made.*memory\.reference_length was 32"):
        prepare_text(config, workdir, documents, say=lambda _: None)
    config.memory.reference_length = 32
    with open(documents, "a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(TextError, match="tokenizer was made from other inputs: documents"):
        prepare_text(config, workdir, documents)


def test_knowledge_of_its_own_is_learnt_by_the_tokenizer(config, documents, tmp_path):
    (tmp_path / "k.txt").write_text("Zebra zebra Quagga quagga Zebra Quagga " * 3)
    config.text.vocabulary = config.model.vocabulary = 1000
    prepare_text(config, tmp_path / "w", documents, str(tmp_path / "k.txt"), say=lambda _: None)
    references = References(tmp_path / "w/references")
    assert references.live_keys() == ["k#0"]
    assert len(Tokenizer.load(tmp_path / "w/tokenizer").encode(" Zebra Quagga")) == 2


def test_limit_and_no_validation(config, documents, tmp_path):
    config.text.validation_share = 0.0
    prepare_text(config, tmp_path / "w", documents, limit=7, say=lambda _: None)
    assert len(Corpus(tmp_path / "w/corpus/train")) == 7
    assert not (tmp_path / "w/corpus/validation").exists()
    with pytest.raises(TextError, match="limit = 0"):
        prepare_text(config, tmp_path / "w", documents, limit=0)


def test_empty_split_is_explained_before_anything_is_made(config, documents, tmp_path):
    for share, side in ((1e-9, "training"), (1 - 1e-9, "validation")):
        config.text.validation_share = share
        with pytest.raises(TextError, match=f"puts all 60 documents into {side}"):
            prepare_text(config, tmp_path / "w", documents, say=lambda _: None)
    assert not (tmp_path / "w").exists()


def test_tokenizer_larger_than_the_model(config, documents, tmp_path):
    config.model.vocabulary = 270
    with pytest.raises(TextError, match="300 entries; expected 260 … model.vocabulary = 270"):
        prepare_text(config, tmp_path / "w", documents)
    assert not (tmp_path / "w/tokenizer/manifest.json").exists()


def test_make_part_with_a_damaged_marker(tmp_path):
    assert not make_part(tmp_path / "p", {"a": 1}, lambda folder: None)
    assert make_part(tmp_path / "p", {"a": 1}, lambda folder: pytest.fail("made again"))
    (tmp_path / "p" / INPUTS).write_text("{")
    with pytest.raises(TextError, match="inputs.json is damaged"):
        make_part(tmp_path / "p", {"a": 1}, lambda folder: None)


@pytest.mark.parametrize("in_blocks", [False, True])
def test_a_repeated_id_is_refused_before_anything_is_made(config, documents, tmp_path, in_blocks):
    with open(documents, "a") as file:
        file.write('{"id": "d7", "text": "another"}\n')
    config.text.shuffle = int(in_blocks)
    with pytest.raises(TextError, match=r"'d7' occurs twice \(again at documents\.jsonl:61\)"):
        prepare_text(config, tmp_path / "w", documents, say=lambda _: None)
    assert not (tmp_path / "w" / "tokenizer").exists()
    (tmp_path / "k.jsonl").write_text('{"id": "k", "text": "a"}\n{"id": "k", "text": "b"}\n')
    with pytest.raises(TextError, match=r"'k' occurs twice \(again at k\.jsonl:2\)"):
        prepare_text(config, tmp_path / "v", documents, str(tmp_path / "k.jsonl"))
    assert not (tmp_path / "v").exists()


def test_a_bad_line_at_the_end_is_known_before_anything_is_made(config, documents, tmp_path):
    with open(documents, "a") as file:
        file.write("[]\n")
    config.text.tokenizer_bytes = 2000  # the tokenizer sees no such line
    with pytest.raises(TextError, match=r"documents\.jsonl:61: a JSON list"):
        prepare_text(config, tmp_path / "w", documents)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("in_blocks", [False, True])
def test_what_is_not_read_is_said(config, documents, tmp_path, in_blocks):
    folder = tmp_path / "f"
    (folder / ".git").mkdir(parents=True)
    with open(documents) as file:
        text = file.read()
    (folder / "a.jsonl").write_text(f'{text}\n  \n{{"text": " "}}\n')
    (folder / "README.md").touch()
    said = []
    config.text.shuffle = int(in_blocks)
    prepare_text(config, tmp_path / "w", str(folder), say=said.append)
    assert "not read: " in said[0] and "60 " in said[0]
    for what in (
        "hidden folders (1: ",
        "they are named (1: ",
        "blank lines (2)",
        "empty documents (1)",
    ):
        assert what in said[0]
