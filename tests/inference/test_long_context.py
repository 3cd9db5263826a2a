"""Text longer than the context: what becomes a memory, what is retrieved, and what stays equal."""

from pathlib import Path

import jax
import numpy as np
import pytest
from data.data_workdir import WORLD, make_workdir, tiny_config
from tolerance import close

from m3jax.config import PREFIX_TOKENS
from m3jax.errors import InferenceError
from m3jax.inference.attribution import attribute
from m3jax.inference.cold_start import ColdMemories
from m3jax.inference.generate import Generator
from m3jax.inference.long_context import (
    LongContextGenerator,
    LongContextReferences,
    LongContextRetriever,
)
from m3jax.inference.sampling import Sampling
from m3jax.make_model import make_model
from m3jax.retrieval.lexical import LexicalEmbedder
from m3jax.text.reference_splitter import Piece
from m3jax.text.tokenizer import BOS, Tokenizer

LONGEST, WINDOW, LENGTH = 40, 20, 9
LINES = [person.text for person in WORLD.people[:30]]
PROMPTS = ["\n".join(LINES[:14]), "short", "\n".join(LINES[14:22]) + "\n" + LINES[3]]


class Tiny:
    def __init__(self, folder: Path):
        self.config = tiny_config()
        self.tokenizer = Tokenizer.load(make_workdir(folder, self.config) / "tokenizer")
        self.model = make_model(self.config, PREFIX_TOKENS)
        self.params = jax.jit(self.model.init)(jax.random.key(5))
        self.embedder = LexicalEmbedder(96)
        self.embedder.fit(LINES[:5])

    def long(self, memory=True, window=WINDOW, length=LENGTH, **options):
        memory_retriever = None
        if memory:
            references = LongContextReferences(self.embedder, length)
            own = ColdMemories(self.config, self.model, self.params, references, 1 << 20)
            memory_retriever = LongContextRetriever(references, own, self.tokenizer, 3)
        options = {"stop": (), "longest": LONGEST, **options}
        generator = Generator(self.model, self.params, self.tokenizer, memory_retriever, **options)
        return LongContextGenerator(generator, window)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny(tmp_path_factory.mktemp("context") / "run")


@pytest.fixture(scope="module")
def told():
    return {i: "" for i in range(len(PROMPTS))}


@pytest.fixture(scope="module")
def long(tiny):
    return tiny.long(observe=True)


@pytest.fixture(scope="module")
def found(long, told):
    def listener(number, text):
        told[number] += text

    return long.generate(PROMPTS, 50, listener=listener)


def test_nothing_of_a_text_is_lost_and_nothing_is_twice(tiny, long, found, told):
    """References and what stays make up the text: no gap but white space, no overlap."""
    for number, row in enumerate(found):
        assert len(row.tokens) == len(row.logprobs) == 50
        assert told[number] == row.text
        prompt = tiny.tokenizer.encode(PROMPTS[number])
        np.testing.assert_array_equal(row.prompt_tokens, [BOS, *prompt])
        text = tiny.tokenizer.decode([*prompt, *row.tokens])
        own = [r for r in long.references if r.key.startswith(f"text {number}#")]
        assert [r.key for r in own] == [f"text {number}#{n}" for n in range(len(own))]
        end = 0
        for one in own:
            assert one.text == text[one.start : one.end] and 0 < len(one.tokens) <= LENGTH
            assert one.start >= end and not text[end : one.start].strip()
            end = one.end
        tokens = [*prompt, *row.tokens]
        read = next(
            n for n in range(len(tokens)) if tiny.tokenizer.decode(tokens[n:]) in text[end:]
        )
        assert WINDOW <= len(tokens) - read < LONGEST + 1
    assert long.references[0].text == LINES[0].strip()


def test_retrievals_search_their_own_text_alone(tiny, long, found):
    for number, row in enumerate(found):
        everything = np.concatenate([row.prompt_tokens, row.tokens])
        read = {i for chunk in row.chunks for i in chunk.ids[chunk.ids >= 0].tolist()}
        assert read, number
        assert {long.references[i].key.split("#")[0] for i in read} == {f"text {number}"}
        for chunk in row.chunks:
            part = everything[slice(*chunk.retrieval.query)]
            assert chunk.query.strip() in tiny.tokenizer.decode(part)
    generated = [chunk.retrieval.generates for chunk in found[0].chunks]
    spans = [span for span in generated if span[1] > span[0]]
    first = len(found[0].prompt_tokens)
    assert spans[0][0] == first and spans[-1][1] == first + 50
    assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))
    shown = attribute(found[0], long.references)
    assert sum(one.attention for one in shown) == pytest.approx(
        found[0].by_token[:, :-1].sum() / 50
    )


def test_the_text_of_a_fact_is_found_by_its_name(tiny):
    long = tiny.long()
    person = WORLD.people[2]
    long.generate(["\n".join(LINES[:14]) + f"\n{person.facts[0][0]} of {person.name}"], 1)
    assert long.references.search(person.name, 0, 2).tolist() == [-1, -1]  # it has ended
    references = LongContextReferences(tiny.embedder, LENGTH)
    references.add(0, [Piece(one.start, one.end, one.text, one.tokens) for one in long.references])
    best = references.search(person.name, 0, 1)[0]
    assert person.name in references[best].text
    assert references.search(person.name, 1, 2).tolist() == [-1, -1]


@pytest.mark.slow
def test_company_changes_nothing(tiny, found):
    alone = tiny.long(observe=True).generate([PROMPTS[2]], 3)[0]
    long = tiny.long(observe=True)
    long.generate(["first " + PROMPTS[0]], 2)  # texts of an earlier call are not found any more
    again = long.generate([PROMPTS[1], PROMPTS[2]], 3)[1]
    np.testing.assert_array_equal(alone.tokens, again.tokens)
    close(alone.logprobs, again.logprobs)


@pytest.mark.slow
def test_draws_are_told_text_and_place(tiny, monkeypatch):
    """Not the round, which depends on the company."""
    long, told, before = tiny.long(memory=False), [], {}
    generate = long.generator.generate

    def spy(prompts, new, **options):
        told.append(options["row_ids"])
        for row in options["row_ids"]:
            before.setdefault(row, []).append(options["before"])
        return generate(prompts, new, **options)

    monkeypatch.setattr(long.generator, "generate", spy)
    long.generate([PROMPTS[1], PROMPTS[2]], 20)
    again = long.generate([PROMPTS[2]], 20)[0]
    assert told[0] == [0, 1] and told[-1] == [2] and len(told) > 2
    assert len(again.tokens) == 20
    for places in before.values():
        assert places[0] == 0 and places == sorted({*places}) and places[-1] < 20


@pytest.mark.slow
def test_a_text_that_fits_is_generated_as_without_a_window(tiny):
    plain = tiny.long(memory=False).generator.generate(["pet of"], 5)[0]
    found = tiny.long(memory=False).generate(["pet of"], 5)[0]
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    long = tiny.long()
    np.testing.assert_array_equal(long.generate(["pet of"], 5)[0].tokens, plain.tokens)
    assert len(long.references) == 0


def test_the_window_alone_is_read_without_memory(tiny):
    """What is forgotten changes nothing; with memory it does."""
    same_end = ["\n".join([LINES[0], *LINES[2:14]]), "\n".join([LINES[1], *LINES[2:14]])]
    one, other = tiny.long(memory=False).generate(same_end, 1)
    close(one.logprobs, other.logprobs)
    ends = [text + "\n" + LINES[0] + LINES[1] for text in same_end]
    one, other = tiny.long().generate(ends, 1)
    assert np.abs(one.logprobs - other.logprobs).max() > 1e-5


@pytest.mark.slow
def test_a_stopped_text_ends_and_the_others_go_on(tiny):
    rows = tiny.long(sampling=Sampling(temperature=1.0, seed=3)).generate(PROMPTS, 50)
    stop = int(rows[1].tokens[30])
    first = rows[1].tokens.tolist().index(stop)
    ended = tiny.long(sampling=Sampling(temperature=1.0, seed=3), stop=(stop,))
    again = ended.generate(PROMPTS, 50)
    assert again[1].stopped
    np.testing.assert_array_equal(again[1].tokens, rows[1].tokens[: first + 1])
    others = [row for row, before in zip(again, rows, strict=True) if stop not in before.tokens]
    assert all(len(row.tokens) == 50 and not row.stopped for row in others)


def test_white_space_and_broken_characters_are_no_trap(tiny):
    long = tiny.long()
    row = long.generate([" \n" * 200 + "pet of" + "\n" * 90 + "é漢" * 30], 3)[0]
    assert len(row.tokens) == 3
    text = "".join(one.text for one in long.references)
    assert text.startswith("pet of") and "\N{REPLACEMENT CHARACTER}" not in text


def test_unusable_settings_are_refused(tiny):
    with pytest.raises(InferenceError, match="take a window from 1 to 28"):
        tiny.long(window=29)
    tiny.long(window=28)
    with pytest.raises(InferenceError, match="references of 3 tokens; take 4 to 9"):
        tiny.long(length=3)
    with pytest.raises(InferenceError, match="references of 10 tokens; take 4 to 9"):
        tiny.long(length=10)
    with pytest.raises(InferenceError, match="leave no room in a context of 12"):
        tiny.long(longest=12)
    with pytest.raises(InferenceError, match="prompt 0 is empty"):
        tiny.long().generate([""], 3)


def test_references_are_a_set_that_the_writer_takes():
    embedder = LexicalEmbedder(96)
    embedder.fit(["a"])
    references = LongContextReferences(embedder, 5)
    assert len(references) == 0 and references.search("x", 0, 2).tolist() == [-1, -1]
    tokens = np.array([7, 8], np.int32)
    references.add(4, [Piece(0, 3, "red", tokens), Piece(3, 8, "green", tokens[::-1])])
    references.add(5, [Piece(1, 5, "blue", tokens[:1])])
    references.add(5, [])
    references.add(4, [Piece(9, 14, "white", tokens)])
    keys = ["text 4#0", "text 4#1", "text 5#0", "text 4#2"]
    assert [one.key for one in references] == keys
    assert references.tokens(np.array([1, 2])).tolist() == [[8, 7, 0, 0, 0], [7, 0, 0, 0, 0]]
    assert references.lengths.tolist() == [2, 2, 1, 2]
    assert references.documents().tolist() == [0, 0, 1, 2]
    assert references.search("green", 4, 2).tolist() == [1, -1]
    assert references.search("white", 4, 2).tolist() == [3, -1]
    assert references.search("green", 5, 2).tolist() == [-1, -1]
    references.close([4, 6])
    assert references.search("green", 4, 2).tolist() == [-1, -1]
    assert references.search("blue", 5, 1).tolist() == [2]
