"""Generation end to end on a tiny prepared folder: what is retrieved, streamed and refused."""

import dataclasses
import html
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data.data_workdir import make_workdir, tiny_config
from tolerance import close

from m3jax.config import PREFIX_TOKENS
from m3jax.errors import InferenceError
from m3jax.inference import cli
from m3jax.inference.attribution import as_dict, as_page, as_text, attribute, effects_of
from m3jax.inference.cold_start import ColdMemories
from m3jax.inference.generate import Generator
from m3jax.inference.memory_retrieval import MemoryRetriever, retrieval_schedule
from m3jax.inference.sampling import Sampling
from m3jax.inference.session import Session
from m3jax.knowledge.versions import open_bank, open_references, open_retriever, open_version
from m3jax.make_model import make_model
from m3jax.memory.bank import Bank
from m3jax.memory.write import write_bank
from m3jax.model.transformer import Model
from m3jax.random_key import random_key
from m3jax.text.tokenizer import BOS, Tokenizer

NEW = 24
PROMPTS = [  # of as many chunks, so that each alone is the same program
    "the pet of Livu and the home of Nivo",
    "pet of Livu and the home of Nivo and pet",
    "the food of Nivo of Livu and the home",
]


@dataclasses.dataclass
class World:
    config: object
    model: Model
    params: dict
    tokenizer: Tokenizer
    references: object
    retriever: object
    bank: object

    def generator(self, memory=True, **options):
        memory_retriever = (
            MemoryRetriever(self.retriever, self.bank, self.tokenizer, 3) if memory else None
        )
        return Generator(
            self.model,
            self.params,
            self.tokenizer,
            memory_retriever,
            stop=(),
            longest=100,
            **options,
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    config = tiny_config()
    workdir = make_workdir(tmp_path_factory.mktemp("inference") / "run", config)
    version, tokenizer = open_version(workdir), Tokenizer.load(workdir / "tokenizer")
    references = open_references(config, version, tokenizer)
    model = make_model(config, PREFIX_TOKENS)
    return World(
        config,
        model,
        jax.jit(model.init)(jax.random.key(5)),
        tokenizer,
        references,
        open_retriever(config, version, references, 2 / 3),
        open_bank(version, references),
    )


@pytest.fixture(scope="module")
def found(world):
    return world.generator(observe=True).generate(PROMPTS, NEW)


def same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        close(a.logprobs, b.logprobs)
        assert a.text == b.text


def test_retrievals_follow_the_schedule_and_search_their_own_text(world, found):
    chunk = world.config.memory.chunk_length
    for prompt, row in zip(PROMPTS, found, strict=True):
        tokens = np.concatenate([[BOS], world.tokenizer.encode(prompt)])
        np.testing.assert_array_equal(row.prompt_tokens, tokens)
        everything = np.concatenate([tokens, row.tokens])
        assert [one.retrieval for one in row.chunks] == retrieval_schedule(len(tokens), NEW, chunk)
        for one in row.chunks:
            part = everything[slice(*one.retrieval.query)]
            query = world.tokenizer.decode(t for t in part if t != BOS)
            assert one.query == query
            wanted = world.retriever.retrieve([query], None, 3)[0]
            np.testing.assert_array_equal(one.ids, wanted)


def test_memories_make_a_difference(world, found):
    without = world.generator(memory=False).generate(PROMPTS, NEW)
    assert without[0].chunks == []
    pairs = zip(found, without, strict=True)
    assert any(np.abs(a.logprobs[0] - b.logprobs[0]) > 1e-3 for a, b in pairs)


def test_company_and_pieces_change_nothing_and_streamed_text_is_the_text(world, found):
    told = {0: "", 1: "", 2: ""}

    def listener(number, text):
        told[number] += text

    alone = world.generator().generate(PROMPTS, NEW, piece=4, groups=3, listener=listener)
    same(alone, found)
    assert [told[i] for i in range(3)] == [row.text for row in found]


def test_draws_depend_on_seed_row_and_place_alone():
    logits = jax.random.normal(jax.random.key(0), (1, 500)).repeat(4, axis=0)

    def drawn(rows, number, seed=3):
        sampling = Sampling(temperature=2.0, top_k=400, top_p=0.9, seed=seed)
        return np.asarray(sampling(logits[: len(rows)], jnp.array(rows), jnp.int32(number)))

    first = drawn([(0, 0), (1, 0), (2, 0), (3, 0)], 7)
    np.testing.assert_array_equal(drawn([(2, 0), (1, 0)], 7), first[[2, 1]])
    np.testing.assert_array_equal(drawn([(2, 4), (1, 7)], 3), [first[2], drawn([(1, 0)], 10)[0]])
    seeds = [0, 4, 2**31, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
    others = [drawn([(0, 0)], 8)[0], *(drawn([(0, 0)], 7, seed)[0] for seed in seeds)]
    assert len({*first.tolist(), *map(int, others)}) >= 10


def test_a_text_does_not_depend_on_the_batch(world, capsys):
    """Equal prompts of one command are texts of their own, however many run together."""
    generator = world.generator(memory=False, sampling=Sampling(temperature=1.0, seed=3))
    texts, session = [], object.__new__(Session)
    for batch in (1, 3, 4):
        request = cli.Request(["pet of Livu"] * 4, mode="none", new_tokens=6, batch=batch)
        texts.append(
            [generation.text for generation, _ in cli._generated(session, generator, request)]
        )
    assert texts[0] == texts[1] == texts[2] and len({*texts[0]}) == 4
    assert texts[0][3] in capsys.readouterr().out


def test_keys_of_all_seeds_differ():
    seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**63, 2**64 - 1]
    keys = {tuple(jax.random.key_data(random_key(seed)).tolist()) for seed in seeds}
    assert len(keys) == len(seeds)
    small = [jax.random.key_data(make(7)) for make in (random_key, jax.random.key)]
    np.testing.assert_array_equal(*small)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=str(seed)):
            random_key(seed)


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-30, 1e-5])
@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.5}])
def test_a_tiny_temperature_is_greedy(temperature, cut):
    logits = 1e3 * jax.random.normal(jax.random.key(0), (16, 50))
    logits = logits.at[:, 7].set(-jnp.inf)
    rows = jnp.stack([jnp.arange(16), jnp.zeros(16, int)], 1)
    drawn = Sampling(temperature=temperature, seed=5, **cut)(logits, rows, jnp.int32(2))
    np.testing.assert_array_equal(drawn, logits.argmax(-1))


def test_a_stop_token_ends_a_row_and_its_retrievals(world, found):
    row = found[1]
    stop = int(row.tokens[13])  # in the second generated chunk
    first = int(np.flatnonzero(row.tokens == stop)[0])
    memory_retriever = MemoryRetriever(world.retriever, world.bank, world.tokenizer, 3)
    generator = Generator(
        world.model, world.params, world.tokenizer, memory_retriever, stop=(stop,), longest=100
    )
    ended = generator.generate([PROMPTS[1]], NEW)[0]
    assert ended.stopped
    np.testing.assert_array_equal(ended.tokens, row.tokens[: first + 1])
    assert all(
        one.retrieval.generates[0] <= len(ended.prompt_tokens) + first for one in ended.chunks
    )


def test_cold_memories_are_those_of_the_bank(world):
    """The bank of the folder was written by other weights: both are written here by the same."""
    config = world.config
    cold = ColdMemories(config, world.model, world.params, world.references, 10_000)
    again = ColdMemories(config, world.model, world.params, world.references, 0)
    ids = np.array([[3, -1, 5], [5, 5, 7]])
    one, other = cold.read_stored(ids), again.read_stored(ids)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)
    assert one.keys.shape == (1, 2, 3, 2, 4, 8)
    assert one.length[0, 1] == 0 and not one.keys[:, 0, 1].any() and one.keys[:, 0, 0].any()
    assert cold.written == again.written == 3
    cold.read_stored(ids), again.read_stored(ids)
    assert (cold.written, again.written) == (3, 6)
    bank = world.bank.read_stored(ids)
    np.testing.assert_array_equal(one.length, bank.length)


@pytest.mark.slow
def test_heads_with_counts_read_banks_and_cold_memories(world, tmp_path):
    """Both are written by the model itself; a text generated with one is that with the other."""
    config = tiny_config(memory__counts="0:1+6")
    model, params = make_model(config, PREFIX_TOKENS), world.params
    cold = ColdMemories(config, model, params, world.references, 10_000)
    write_bank(config, model, params, world.references, tmp_path / "bank", progress=False)
    bank, ids = Bank.open(tmp_path / "bank"), np.array([[3, -1, 5], [5, 5, 7]])
    one, other = cold.read_stored(ids), bank.read_stored(ids)
    assert one.keys.shape == (1, 2, 3, 1, 7, 8)
    jax.tree.map(close, one, other)

    def text(memories, model):
        retriever = MemoryRetriever(world.retriever, memories, world.tokenizer, 3)
        options = {"stop": (), "longest": 100, "observe": True}
        return Generator(model, params, world.tokenizer, retriever, **options).generate(
            PROMPTS, NEW
        )

    found = text(bank, model)
    same(found, text(cold, model))
    own = ColdMemories(world.config, world.model, params, world.references, 10_000)
    uniform = text(own, world.model)
    assert any(
        np.abs(a.logprobs[0] - b.logprobs[0]) > 1e-4 for a, b in zip(found, uniform, strict=True)
    )


def test_effects_are_what_a_text_loses_without_a_reference(world, found):
    generator = world.generator()
    effects = effects_of(generator, found[1])
    chunks = [one.ids for one in found[1].chunks]
    assert set(effects) == {i for row in chunks for i in row[row >= 0].tolist()}
    taken = max(effects, key=lambda i: abs(effects[i]))
    assert abs(effects[taken]) > 1e-4
    without = [np.where(row == taken, -1, row) for row in chunks]
    again = generator.generate([PROMPTS[1]], NEW, forced=[found[1].tokens], references=[without])[0]
    np.testing.assert_array_equal(again.tokens, found[1].tokens)
    lost = found[1].logprobs.sum() - again.logprobs.sum()
    close(effects[taken], lost, size=abs(found[1].logprobs.sum()))


def test_sources_name_what_was_read(world, found):
    row = found[1]
    read = attribute(row, world.references, {int(row.chunks[0].ids[0]): 0.5})
    assert {one.id for one in read} == {
        i for chunk in row.chunks for i in chunk.ids[chunk.ids >= 0].tolist()
    }
    one = next(source for source in read if source.id == row.chunks[0].ids[0])
    assert one.reference.text == world.references[one.id].text and one.effect == 0.5
    weights = [source.attention for source in read]
    assert weights == sorted(weights, reverse=True)
    assert 0 < sum(weights) < 1
    assert sum(weights) == pytest.approx(row.by_token[:, :-1].sum() / NEW, rel=1e-5)
    assert one.reference.key in as_text(read) and one.reference.title in as_text(read)
    record = as_dict(row, read, by_head=True)
    assert record["sources"][0]["key"] == read[0].reference.key
    last = record["chunks"][-1]
    heads = np.array(last["attention_by_layer_and_head"])  # (L, K, G, M)
    assert heads.shape == (1, 2, 1, 3)
    close(heads.mean((0, 1, 2)), last["attention"])


def test_the_page_has_text_sources_and_no_raw_markup(world, found):
    row = dataclasses.replace(found[1], prompt="<script>&")
    page = as_page([(row, attribute(row, world.references))], world.tokenizer)
    shown = page.partition('<div class="text">')[2].partition("</div>")[0]
    assert html.unescape(re.sub("<[^>]*>", "", shown)) == row.text
    assert "<script>" not in page and "&lt;script&gt;&amp;" in page
    readers = [one.retrieval.generates for one in row.chunks if (one.ids >= 0).any()]
    assert page.count("of the attention") == sum(high - low for low, high in readers) > 0
    for one in attribute(row, world.references):
        assert one.reference.text in page


@pytest.mark.parametrize(
    ("prompts", "new", "words"),
    [
        ([], 4, "there are no prompts"),
        (["fine", ""], 4, "prompt 1 is empty"),
        (["of " * 95], 20, "does not fit the model's context of 100"),
        (["fine"], 0, "0 new tokens"),
    ],
)
def test_unusable_prompts_are_refused(world, prompts, new, words):
    with pytest.raises(InferenceError, match=words):
        world.generator().generate(prompts, new)


@pytest.mark.parametrize(
    "setting", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"seed": -1}, {"seed": 2**64}]
)
def test_unusable_sampling_is_refused(setting):
    with pytest.raises(InferenceError, match=next(iter(setting))):
        Sampling(**setting)


def test_top_k_and_top_p_cut():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]])).repeat(400, axis=0)
    rows, number = jnp.stack([jnp.arange(400), jnp.zeros(400, int)], 1), jnp.int32(0)

    def drawn(**setting):
        return set(np.asarray(Sampling(temperature=1.0, **setting)(logits, rows, number)).tolist())

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_p=0.75) == {0, 1}
    assert drawn(top_p=0.85) == {0, 1, 2}
    assert set(np.asarray(Sampling()(logits, rows, number)).tolist()) == {0}
