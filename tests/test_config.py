"""The config schema: what is refused, with which words, and what survives JSON."""

import itertools
import json
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from m3jax import config as m3config
from m3jax.config.fields import FIELDS
from m3jax.config.reference import describe
from m3jax.config.renamed import RENAMED
from m3jax.errors import ConfigError


def changed(**values: Any) -> ConfigDict:
    """The default config with fields changed; `model__layers` stands for `model.layers`."""
    config = m3config.default()
    with config.ignore_type():
        for path, value in values.items():
            section, _, field = path.rpartition("__")
            (config[section] if section else config)[field] = value
    return config


def refused(*parts: str, **values: Any) -> None:
    """Asserts that the config is refused in words that contain all parts."""
    with pytest.raises(ConfigError) as caught:
        m3config.validate(changed(**values))
    for part in parts:
        assert part in str(caught.value)


def fields(config: ConfigDict) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, ConfigDict)
        flat.update({f"{key}.{k}": v for k, v in value.items()} if nested else {key: value})
    return flat


def test_default_is_valid_and_locked() -> None:
    config = m3config.validate(m3config.default())
    with pytest.raises(AttributeError, match="layer_count"):
        config.model.layer_count = 3


def test_description_names_every_field_with_its_default() -> None:
    text = describe()
    for path, value in fields(m3config.default()).items():
        assert f"{path} = {value!r}" in text


def test_unknown_field_lists_its_neighbours() -> None:
    config = m3config.default().unlock()
    config.memory.kept = 4
    with pytest.raises(ConfigError, match=r"config\.memory\.kept is not a field") as caught:
        m3config.validate(config)
    assert "memory.kept_tokens" in str(caught.value)
    assert "model.layers" not in str(caught.value)


def test_unknown_top_level_field() -> None:
    config = m3config.default().unlock()
    config.learning_rate = 1e-3
    with pytest.raises(ConfigError, match=r"config\.learning_rate is not a field; known: name"):
        m3config.validate(config)


def test_missing_field_says_where_to_start() -> None:
    config = m3config.default().unlock()
    del config.data["sequence_length"]
    with pytest.raises(ConfigError, match=r"config\.data\.sequence_length is missing.*default\(\)"):
        m3config.validate(config)


@pytest.mark.parametrize(
    ("field", "value", "got", "expected"),
    [
        ("model__layers", 4.0, "float", "int"),
        ("model__layers", "4", "str", "int"),
        ("model__layers", True, "bool", "int"),
        ("model__layers", None, "NoneType", "int"),
        ("optimizer__learning_rate", "1e-3", "str", "float"),
        ("model__tied_embeddings", 1, "int", "bool"),
        ("name", 7, "int", "str"),
    ],
)
def test_wrong_type(field: str, value: Any, got: str, expected: str) -> None:
    path = field.replace("__", ".")
    refused(f"config.{path} = {value!r}", f"type {got}", f"expected {expected}", **{field: value})


def test_a_whole_number_serves_as_float() -> None:
    m3config.validate(changed(optimizer__learning_rate=1))


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("model__layers", 0, "[1, inf)"),
        ("model__norm_epsilon", 0.0, "(0, 1)"),
        ("model__norm_epsilon", 1.0, "(0, 1)"),
        ("model__init_exponent", 0.1, "[-2, 0]"),
        ("memory__dropout", 1.0, "[0, 1)"),
        ("retrieval__overlap_train", 0.0, "(0, 1]"),
        ("retrieval__overlap_train", 1.1, "(0, 1]"),
        ("retrieval__encoder_batch", 0, "[1, inf)"),
        ("seed", -1, "[0, 18446744073709551616)"),
        ("seed", 2**64, "[0, 18446744073709551616)"),
        ("optimizer__learning_rate", float("nan"), "(0, 1000]"),
        ("optimizer__learning_rate", float("inf"), "(0, 1000]"),
    ],
)
def test_out_of_its_interval(field: str, value: Any, accepted: str) -> None:
    path = field.replace("__", ".")
    refused(f"config.{path} = {value!r}", f"accepted: {accepted}", **{field: value})


def test_ends_that_belong_to_the_interval() -> None:
    m3config.validate(changed(model__init_exponent=-2.0))
    m3config.validate(changed(model__init_exponent=0))
    m3config.validate(changed(memory__dropout=0.0, retrieval__overlap_train=1.0))


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("memory__source", "bank", "'none', 'precomputed', 'online', 'stop_gradient'"),
        ("model__remat", "all", "'none', 'dots', 'attention', 'full'"),
        ("retrieval__shift", 2, "0, 1"),
        ("retrieval__embedder", "gpt", "'lexical', 'bert'"),
        ("retrieval__pooling", "max", "'auto', 'mean', 'cls'"),
        ("retrieval__encoder_dtype", "float16", "'float32', 'bfloat16'"),
    ],
)
def test_not_among_the_choices(field: str, value: Any, accepted: str) -> None:
    refused(f"config.{field.replace('__', '.')} = {value!r}", accepted, **{field: value})


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"model__kv_heads": 3}, ("model.kv_heads = 3", "divide model.query_heads = 4")),
        ({"model__head_dim": 33}, ("model.head_dim = 33", "even")),
        (
            {"model__previous_token_head": 4.0},
            ("model.previous_token_head", "model.attention_bias = True"),
        ),
        (
            {
                **{"model__previous_token_head": 4.0, "model__attention_bias": True},
                "model__no_rope_every": 1,
            },
            ("model.previous_token_head", "RoPE in the first layer"),
        ),
        (
            {"memory__first_layer": 3},
            ("memory.layers = 2", "memory.first_layer = 3 on do not all exist", "model.layers = 4"),
        ),
        (
            {"data__sequence_length": 100},
            ("data.sequence_length = 100", "memory.chunk_length = 64"),
        ),
        (
            {"memory__kept_tokens": 129},
            ("memory.kept_tokens = 129", "memory.reference_length = 128"),
        ),
        ({"train__microbatches": 3}, ("train.microbatches = 3", "data.batch_size = 16")),
        ({"text__vocabulary": 2048}, ("model.vocabulary = 1024", "text.vocabulary = 2048")),
        ({"chat__user": ""}, ("chat.user", "differ from the others")),
        ({"chat__assistant": "\nUser:"}, ("chat.user", "differ from the others")),
        ({"data__packing": "pairs", "memory__dropout": 0.1}, ("memory.dropout", "must be 0")),
        (
            {"memory__per_chunk": 2, "memory__distractors": 2},
            ("memory.distractors = 2", "below memory.per_chunk = 2"),
        ),
        (
            {"data__packing": "pairs", "memory__per_chunk": 2, "memory__distractors": 1},
            ("memory.distractors = 1", "must be 0"),
        ),
        ({"data__packing": "pairs", "train__z_loss": 0.1}, ("train.z_loss", "must be 0")),
        (
            {"optimizer__lr_warmup_share": 0.1},
            ("optimizer.lr_warmup_share", "optimizer.lr_warmup_steps"),
        ),
        ({"retrieval__ids": "stored"}, ("retrieval.ids", "data.packing = 'document'")),
        (
            {"retrieval__candidates": 4},
            ("retrieval.candidates = 4", "memory.per_prompt_chunk"),
        ),
        (
            {"retrieval__embedder": "bert"},
            ("retrieval.encoder = ''", "the encoder's folder with retrieval.embedder = 'bert'"),
        ),
        ({"retrieval__encoder": "minilm"}, ("retrieval.encoder = 'minilm'", "it is 'lexical'")),
        (
            {"writer__document_context": True, "memory__source": "online"},
            ("writer.document_context = True", "memory.source = 'precomputed'"),
        ),
        (
            {"writer__document_context": True, "writer__document_context_tokens": 255},
            ("writer.document_context_tokens = 255", "memory.reference_length = 128"),
        ),
        (
            {"retrieval__checkpoint": "c"},
            ("retrieval.checkpoint = 'c'", "retrieval.rerank above 0 only"),
        ),
        (
            {"retrieval__embedder": "attention"},
            ("retrieval.embedder = 'attention'", "'lexical', 'bert'; ", "retrieval.rerank"),
        ),
        (
            {"retrieval__rerank": 1.0, "train__refresh_every": 5, "memory__source": "precomputed"},
            ("retrieval.rerank = 1.0", "train.refresh_every"),
        ),
        ({"retrieval__rerank": -1.0}, ("retrieval.rerank = -1.0", "[0, inf)")),
        ({"optimizer__lr_warmup_steps": 1001}, ("optimizer.lr_warmup_steps", "train.steps = 1000")),
        ({"mesh__fsdp": 0}, ("mesh.fsdp = 0", "-1 or at least 1")),
        ({"stage": ""}, ("config.stage", "not empty")),
        ({"stage": "a/b"}, ("config.stage = 'a/b'", "no slash")),
        ({"stage": ".."}, ("config.stage = '..'", "dot at either end")),
        ({"stage": "a\nb"}, ("config.stage = 'a\\nb'", "no control character")),
        ({"stage": "bank"}, ("config.stage = 'bank'", "folder bank for other things")),
        ({"stage": "Versions"}, ("config.stage = 'Versions'", "folder versions")),
    ],
)
def test_combinations_that_cannot_work(values: dict[str, Any], parts: tuple[str, ...]) -> None:
    refused(*parts, **values)


def test_an_encoder_and_a_checkpoint_with_what_reads_them() -> None:
    m3config.validate(changed(retrieval__rerank=2.0, retrieval__checkpoint="run/warmup"))
    m3config.validate(changed(retrieval__embedder="bert", retrieval__encoder="models/minilm"))


def test_json_round_trip() -> None:
    config = m3config.validate(changed(memory__source="online", model__layers=7, name="Größe"))
    text = m3config.to_json(config)
    again = m3config.validate(ConfigDict(json.loads(text)))
    assert again.to_dict() == config.to_dict()
    assert m3config.to_json(again) == text
    assert "Größe" in text


def test_prefix_follows_stage_and_option() -> None:
    assert m3config.prefix_tokens(m3config.default()) == ()
    for config in changed(model__prefix="always"), changed(memory__source="precomputed"):
        assert m3config.prefix_tokens(config) == m3config.PREFIX_TOKENS


OPTIONS: dict[str, Any] = {"stage": ("warmup", "continual"), "kept": (8, 4, 16), "other": (8, 2)}


def test_options_default_to_their_first_value() -> None:
    assert m3config.parse_options("", **OPTIONS) == {"stage": "warmup", "kept": 8, "other": 8}


@pytest.mark.parametrize("text", ["continual,4", "stage=continual,kept=4", " kept=4 , continual,"])
def test_options_by_name_or_bare(text: str) -> None:
    assert m3config.parse_options(text, **OPTIONS) == {
        "stage": "continual",
        "kept": 4,
        "other": 8,
    }


@pytest.mark.parametrize("word", ["finetune", "stage=4", "kept=5", "size=2", "8", "=continual="])
def test_unknown_or_ambiguous_options(word: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(word))) as caught:
        m3config.parse_options(f"continual,{word}", **OPTIONS)
    assert "stage=warmup|continual; kept=8|4|16; other=8|2" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("", None),
        ("1,2", None),  # all heads of all memory layers
        ("2", ((2, 0), (2, 1), (2, 2))),
        ("2:2+0, 1:1", ((1, 1), (2, 0), (2, 2))),
    ],
)
def test_memory_heads(text: str, pairs: Any) -> None:
    shape = {"model__layers": 4, "model__kv_heads": 3, "model__query_heads": 6}
    memory = {"memory__first_layer": 1, "memory__layers": 2, "memory__heads": text}
    config = m3config.validate(changed(**shape, **memory))
    assert m3config.memory_heads(config.model, config.memory) == pairs
    counts = np.zeros((2, 3), int)
    for layer, head in [(1 + i // 3, i % 3) for i in range(6)] if pairs is None else pairs:
        counts[layer - 1, head] = config.memory.kept_tokens
    np.testing.assert_array_equal(m3config.slot_counts(config.model, config.memory), counts)
    assert m3config.stored_slots(config.model, config.memory) == counts.sum()
    assert m3config.largest_count(config.model, config.memory) == config.memory.kept_tokens
    if pairs is not None:
        again = m3config.parse_heads(m3config.format_heads(pairs[::-1]), range(1, 3), 3)
        assert again == pairs
        refused("config.mesh.tensor = 3", "memory.heads", **shape, **memory, mesh__tensor=3)


@pytest.mark.parametrize("text", ["0:1", "3", "1:3", "1:", "1:0-2", "a", "1:0;2:1"])
def test_heads_that_are_not_there_are_refused(text: str) -> None:
    shape = {"model__layers": 4, "model__kv_heads": 3, "model__query_heads": 6}
    memory = {"memory__first_layer": 1, "memory__layers": 2, "memory__heads": text}
    refused(f"config.memory.heads = {text!r}", "layers 1 … 2", "heads 0 … 2", **shape, **memory)


@pytest.mark.parametrize(
    "counts", [(5, 5, 125), (5, 65, 102), (4, 8, 4), (0, 0), (9,), (3, 40, 2, 1, 38, 7, 9, 12)]
)
def test_heads_of_like_counts_share_an_array(counts: tuple[int, ...]) -> None:
    """Two groups have the least padding of all ways to divide the heads, or save less than 16."""
    groups = m3config.head_groups(counts)
    heads = range(len(counts))
    assert sorted(head for group in groups for head in group.heads) == list(heads)

    def padded(heads: Iterable[int]) -> int:
        own = [counts[head] for head in heads]
        return len(own) * max(own, default=0)

    for group in groups:
        assert group.slots == max(counts[head] for head in group.heads)
    ways = (
        padded(few) + padded(set(heads) - set(few))
        for size in heads
        for few in itertools.combinations(heads, size)
    )
    least, together = min(ways), padded(heads)
    found = sum(padded(group.heads) for group in groups)
    assert found == (least if together - least >= 16 else together)
    assert len(groups) == 1 + (together - least >= 16)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1:1+2+3,2:4+5+6", [[1, 2, 3], [4, 5, 6]]),
        ("2:0+12+0", [[0, 0, 0], [0, 12, 0]]),
        (" 2:1+0+0 , 1:0+0+9", [[0, 0, 9], [1, 0, 0]]),
        ("1:7+7+7,2:7+7+7", [[7, 7, 7], [7, 7, 7]]),
        ("1:0+0+0,2:1+1+1", [[0, 0, 0], [1, 1, 1]]),
    ],
)
def test_counts_of_heads(text: str, expected: list[list[int]]) -> None:
    """They are read, written again, and decide over `heads`, `kept_tokens` and the mesh."""
    shape = {"model__layers": 4, "model__kv_heads": 3, "model__query_heads": 6}
    memory = {"memory__first_layer": 1, "memory__layers": 2, "memory__counts": text}
    config = m3config.validate(changed(**shape, **memory, memory__kept_tokens=5))
    counts = m3config.slot_counts(config.model, config.memory)
    np.testing.assert_array_equal(counts, expected)
    assert m3config.stored_slots(config.model, config.memory) == np.sum(expected)
    assert m3config.largest_count(config.model, config.memory) == np.max(expected)
    pairs = [(i + 1, j) for i, j in np.argwhere(expected).tolist()]
    found = m3config.memory_heads(config.model, config.memory)
    assert found == (None if len(pairs) == 6 else tuple(pairs))
    layers = m3config.memory_layers(config.memory)
    assert layers == range(1, 3)
    written = m3config.format_counts(counts, layers)
    np.testing.assert_array_equal(m3config.parse_counts(written, layers, 3), expected)
    heads = {**shape, "model__kv_heads": 3, "model__head_dim": 4, "mesh__tensor": 3}
    if np.min(expected) < np.max(expected):
        refused("config.mesh.tensor = 3", "memory.counts", **heads, **memory)
    refused("config.memory.heads = '1'", "memory.counts", **shape, **memory, memory__heads="1")


@pytest.mark.parametrize(
    "text",
    [
        "0:1+1+1",
        "3:1+1+1",
        "1:1+1",
        "1:1+1+1+1",
        "1",
        "1:",
        "1:1+-1+1",
        "1:a+1+1",
        "1:1+1+1,1:2+2+2",
    ],
)
def test_counts_that_are_malformed_are_refused(text: str) -> None:
    shape = {"model__layers": 4, "model__kv_heads": 3, "model__query_heads": 6}
    memory = {"memory__first_layer": 1, "memory__layers": 2, "memory__counts": text}
    refused("config.memory.counts: ", "with 3 counts", "layers 1 … 2", **shape, **memory)


def test_counts_of_nothing_and_of_too_much_are_refused() -> None:
    memory = {"memory__first_layer": 1, "memory__layers": 2}
    shape = {"model__layers": 4, "model__kv_heads": 2, "model__query_heads": 6}
    refused("memory.counts = '1:0+0'", "no head keeps", **shape, **memory, memory__counts="1:0+0")
    refused("memory.counts = ','", "no head keeps", **shape, **memory, memory__counts=",")
    refused("keeps 129 tokens", "= 128", **shape, **memory, memory__counts="1:129+0")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory__each": 2}, "memory.selection = 'reconstruction'"),
        ({"memory__each": 9, "memory__selection": "reconstruction"}, "at most the largest count"),
        (
            {"memory__each": 4, "memory__selection": "reconstruction", "memory__counts": "0:3+3"},
            "head, 3",
        ),
    ],
)
def test_mixtures_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    shape = {"model__kv_heads": 2, "model__query_heads": 4}
    refused("config.memory.each = ", words, **shape, **changes)
    allowed = changed(**shape, memory__selection="reconstruction", memory__each=8)
    assert m3config.validate(allowed).memory.each == 8


def test_a_copy_has_no_document_before_it() -> None:
    document = {"writer__document_context": True, "memory__source": "precomputed"}
    refused("writer.document_context", "'received'", memory__selection="reconstruction", **document)
    m3config.validate(changed(memory__selection="received", **document))


@pytest.mark.parametrize("old", sorted(RENAMED))
def test_a_field_of_an_older_name_is_refused_with_the_new_one(old: str) -> None:
    config = m3config.default()
    section, field = old.split(".")
    with config.unlocked():
        config[section][field] = 1
    with pytest.raises(ConfigError) as caught:
        m3config.validate(config)
    assert str(caught.value) == f"config.{old} is now config.{RENAMED[old]}"
    assert RENAMED[old].split(" ")[0] in FIELDS
