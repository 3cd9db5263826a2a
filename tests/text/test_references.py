"""References: where documents are cut, and the knowledge base made of them."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from m3jax.errors import TextError
from m3jax.text import reference_splitter
from m3jax.text.documents import Document
from m3jax.text.reference_splitter import cut_references
from m3jax.text.references import References, write_references
from m3jax.text.tokenizer import PAD, Tokenizer

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "it", "again", "when", "things"]
WORDS += ["unbelievable", "happened"]


@pytest.fixture(scope="module")
def tokenizer():
    words = [f" {w}" * 3 for w in WORDS] + [f"{w}\n" * 3 for w in WORDS]
    return Tokenizer.train([*words, "!\x1c " * 9, "x\x1c\x1cx" * 9], 2000, 2)


def _sentence(n, mark="."):
    return " ".join((WORDS * 3)[:n]) + mark  # n + 1 tokens, as every word is one


def _cut(text, tokenizer, length=16):
    pieces = cut_references(Document("d", text), tokenizer, length)
    for piece in pieces:
        assert piece.text == text[piece.start : piece.end] == piece.text.strip() != ""
        np.testing.assert_array_equal(piece.tokens, tokenizer.encode(piece.text))
        assert 0 < len(piece.tokens) <= length
    for a, b in zip(pieces, pieces[1:], strict=False):
        assert a.end <= b.start
    return [piece.text for piece in pieces]


def test_short_document_is_one_reference(tokenizer):
    assert _cut("the cat", tokenizer) == ["the cat"]
    assert _cut(" \n the cat\nsat \n\n", tokenizer) == ["the cat\nsat"]
    assert _cut("", tokenizer) == _cut(" \n\u3000", tokenizer) == []


def test_whole_paragraphs_are_joined_while_they_fit(tokenizer):
    four = _sentence(3)  # 4 tokens
    # 4 + (1 line feed + 4) × 2 = 14 tokens; a fourth paragraph would make 19.
    assert _cut("\n".join([four] * 4), tokenizer) == ["\n".join([four] * 3), four]
    # Exactly full: 4 + 5 + 1 + 6 = 16.
    assert _cut("\n".join([four, four, _sentence(5)]), tokenizer) == [
        "\n".join([four, four, _sentence(5)])
    ]
    # What follows a full piece does not change it.
    assert _cut("\n".join([four, four, _sentence(5), four]), tokenizer) == [
        "\n".join([four, four, _sentence(5)]),
        four,
    ]
    assert _cut("\n".join([four, four, _sentence(6)]), tokenizer) == [
        "\n".join([four, four]),
        _sentence(6),
    ]
    # A paragraph of exactly the length is not cut, though its line feed is one token more.
    full = _sentence(8) + " " + _sentence(6)
    assert len(tokenizer.encode(full)) == 16
    assert _cut(f"{four}\n{full}\n{four}", tokenizer) == [four, full, four]


def test_long_paragraphs_are_cut_at_sentence_ends(tokenizer):
    six = _sentence(5)
    assert _cut(" ".join([six] * 3), tokenizer) == [f"{six} {six}", six]
    # A heading stays with the first sentences of the long paragraph below it.
    assert _cut("mat\n" + " ".join([six] * 3), tokenizer) == [f"mat\n{six} {six}", six]
    quoted = _sentence(5, mark='."')
    assert _cut(" ".join([quoted] * 4), tokenizer) == [f"{quoted} {quoted}"] * 2
    assert _cut("日本。" * 6, tokenizer)[0].endswith("。")


def test_long_sentences_are_cut_between_words(tokenizer):
    pieces = _cut(" ".join(WORDS * 4), tokenizer)
    assert " ".join(pieces) == " ".join(WORDS * 4)
    assert [len(tokenizer.encode(p)) for p in pieces[:-1]] == [16, 16, 16]


def test_long_words_are_cut_anywhere_but_within_a_character(tokenizer):
    assert "".join(_cut("x" * 100, tokenizer)) == "x" * 100
    pieces = _cut("😀" * 20, tokenizer, length=6)
    assert pieces == ["😀"] * 20
    with pytest.raises(TextError, match="3 tokens cannot hold"):
        cut_references(Document("d", "x"), tokenizer, 3)


@pytest.mark.parametrize("part", ["\n", "ab ", "ab\n", "ab", "a. "])
def test_the_work_grows_as_the_text(tokenizer, part):
    """Counted in lines of Python, so that the machine does not matter."""

    def lines(times: int) -> int:
        count, text = 0, "x" + part * times + "y"

        def trace(frame, event, _):
            nonlocal count
            count += event == "line"
            return trace if frame.f_code.co_filename == reference_splitter.__file__ else None

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            cut_references(Document("d", text), tokenizer, 8)
        finally:
            sys.settrace(before)
        return count

    assert 0 < lines(1600) < 6 * lines(400)


@pytest.mark.parametrize("length", [4, 7, 30])
def test_random_texts_lose_nothing_but_space(tokenizer, length):
    rng = np.random.default_rng(length)
    alphabet = [*WORDS, *WORDS, " ", " ", "\n", "\n\n", ". ", ".", "。", "é", "日本", "😀", "\x1c"]
    alphabet += ["\u3000", "\xa0 ", "'s", "12", "!\x1c", "\x1c\x1c", '"', "  "]
    for _ in range(60):
        text = "".join(rng.choice(alphabet, rng.integers(1, 120)))
        pieces = _cut(text, tokenizer, length)
        assert "".join("".join(pieces).split()) == "".join(text.split())


DOCUMENTS = [
    Document("a", _sentence(9) + "\n" + _sentence(9), title="A", source="file:1"),
    Document("b", "the cat"),
    Document("c", "日本 " * 30, title="C"),
]


@pytest.fixture
def references(tokenizer, tmp_path):
    count = write_references(iter(DOCUMENTS), tokenizer, tmp_path / "r", 16)
    opened = References(tmp_path / "r")
    assert len(opened) == count
    return opened


def test_references_can_be_traced(tokenizer, references):
    references.verify()
    assert references.live_keys()[:3] == ["a#0", "a#1", "b#0"]
    texts = {d.id: d for d in DOCUMENTS}
    for i, key in enumerate(references.live_keys()):
        item, document = references[i], texts[key.split("#")[0]]
        assert item.key == key and references.find(key) == i
        assert (item.title, item.source) == (document.title, document.source)
        assert item.text == document.text[item.start : item.end]
        np.testing.assert_array_equal(item.tokens, tokenizer.encode(item.text))
        assert references.lengths[i] == len(item.tokens)
    assert references.texts([2, 0]) == ["the cat", DOCUMENTS[0].text.split("\n")[0]]
    assert references.tokenizer_fingerprint == tokenizer.fingerprint
    with pytest.raises(TextError, match=r"no reference has the key 'b#1'.*first is 'a#0'"):
        references.find("b#1")


def test_tokens_are_padded_rows(references):
    rows = references.tokens([2, 0, 2])
    assert rows.shape == (3, 16) and rows.dtype == np.int32
    np.testing.assert_array_equal(rows[0], rows[2])
    for row, i in zip(rows, [2, 0, 2], strict=True):
        size = references.lengths[i]
        np.testing.assert_array_equal(row[:size], references[i].tokens)
        assert (row[size:] == PAD).all()
    assert references.lengths.dtype == np.int32
    assert references.tokens([]).shape == (0, 16)
    for bad in (-1, len(references)):
        with pytest.raises(IndexError, match="has no record"):
            references.tokens([0, bad])


def test_hashes_tell_which_references_changed(tokenizer, references, tmp_path):
    write_references(DOCUMENTS, tokenizer, tmp_path / "same", 16)
    same = References(tmp_path / "same")
    assert same.fingerprint == references.fingerprint
    np.testing.assert_array_equal(same.record_hashes, references.record_hashes)
    edited = [DOCUMENTS[0], Document("b", "the mat"), DOCUMENTS[2]]
    write_references(edited, tokenizer, tmp_path / "edited", 16)
    other = References(tmp_path / "edited")
    assert other.fingerprint != references.fingerprint
    assert np.flatnonzero(other.record_hashes != references.record_hashes).tolist() == [2]
    renamed = [DOCUMENTS[0], Document("B", "the cat"), DOCUMENTS[2]]
    write_references(renamed, tokenizer, tmp_path / "renamed", 16)
    other = References(tmp_path / "renamed")
    assert other.fingerprint != references.fingerprint
    np.testing.assert_array_equal(other.record_hashes, references.record_hashes)


def test_documents_are_numbered(tokenizer, references, tmp_path):
    names = [key.rpartition("#")[0] for key in references.live_keys()]
    assert len(set(names)) == 3 < len(names)
    numbers = references.documents()
    assert numbers.tolist() == [list(dict.fromkeys(names)).index(name) for name in names]
    # Ids that contain the sign, one of them the beginning of another.
    alike = [Document(name, " ".join(["the cat"] * 20)) for name in ("a", "a#0", "a#0#1")]
    write_references(alike, tokenizer, tmp_path, 16)
    assert References(tmp_path).documents().tolist() == [0] * 3 + [1] * 3 + [2] * 3


def test_nothing_to_know(tokenizer, tmp_path):
    with pytest.raises(TextError, match="knowledge base is empty"):
        write_references([], tokenizer, tmp_path, 16)
    with pytest.raises(TextError, match="no usable tokens"):
        write_references([Document("a", " \n "), Document("b", "")], tokenizer, tmp_path, 16)
    with pytest.raises(TextError, match="no finished references"):
        References(tmp_path)


def test_duplicate_ids(tokenizer, tmp_path):
    twice = [*DOCUMENTS, Document("b", "other", source="file:9")]
    with pytest.raises(TextError, match=r"document id.*'b' occurs twice \(again at file:9\)"):
        write_references(twice, tokenizer, tmp_path, 16)


def test_a_name_that_is_a_key_and_an_id_is_refused(tokenizer, tmp_path):
    documents = [Document("a", "the cat"), Document("a#0", "a mat"), Document("C#", "it sat")]
    write_references(documents, tokenizer, tmp_path, 16)
    references = References(tmp_path)
    assert [references.ids_of(name) for name in ("a", "a#0#0", "C#", "C##0", "b", "a#1")] == [
        *([0], [1], [2], [2], [], [])
    ]
    with pytest.raises(TextError, match=r"'a#0' is the key of a reference of document 'a' and the"):
        references.ids_of("a#0")


@pytest.mark.parametrize("name", ["records-00000.array_record", "tokens.bin", "table.bin"])
def test_damaged_files_are_named(references, name):
    path = references.folder / name
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(TextError, match=rf"{name} is damaged \(its checksum differs\)"):
        References(references.folder).verify()
    path.write_bytes(data[:-1])
    with pytest.raises(TextError, match=rf"{name} has {len(data) - 1} bytes"):
        References(references.folder)


def test_tokens_are_compared_with_their_hash_when_they_are_read(references):
    path, last = references.folder / "tokens.bin", len(references) - 1
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    damaged = References(references.folder)
    assert (damaged.tokens(range(last)) == references.tokens(range(last))).all()
    with pytest.raises(TextError, match=rf"tokens\.bin is damaged \(tokens of reference {last}\)"):
        damaged.tokens([0, last])


def test_several_threads(references):
    def work(seed):
        ids = np.random.default_rng(seed).integers(0, len(references), 20)
        return all(
            references.find(references[i].key) == i
            and (references.tokens([i])[0, : references.lengths[i]] == references[i].tokens).all()
            for i in ids.tolist()
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(40)))
