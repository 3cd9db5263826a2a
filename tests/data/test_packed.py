"""Packed rows: whole chats, each token where it belongs, few places empty; and their references."""

import json

import numpy as np
import pytest
from data.data_workdir import WORLD, make_workdir, tiny_config

from m3jax.data.pipeline import open_pipeline
from m3jax.data.rows import PackedRows, pack
from m3jax.errors import TextError
from m3jax.quickstart import people
from m3jax.text.chat.corpus import prepare_chats
from m3jax.text.corpus import Corpus
from m3jax.text.tokenizer import PAD


def sizes_like_chats(count):
    """Log-normal, as answers are: most are short, few are long."""
    drawn = np.random.default_rng(0).lognormal(5.0, 0.9, count)
    return np.clip(drawn, 8, 2048).astype(int)


def test_every_item_is_packed_once_and_little_room_is_left():
    sizes = sizes_like_chats(5000)
    groups = pack(sizes, 2048)
    assert sorted(item for group in groups for item in group) == list(range(5000))
    totals = np.array([sizes[group].sum() for group in groups])
    assert totals.max() <= 2048
    assert totals.sum() / (2048 * len(groups)) > 0.99
    assert groups == pack(sizes, 2048)


def test_best_fit_decreasing_by_hand():
    # 7 | 6 | 5 | then 4 into the fullest group it fits (6), 3 into that of 7, 2 into that of 5
    assert pack([2, 7, 3, 6, 4, 5], 10) == [[0, 5], [1, 2], [3, 4]]
    assert pack([10, 10], 10) == [[0], [1]]


def folder_of(tmp_path_factory, name, records, **changes):
    config = tiny_config(**{"data__packing": name, "chat__user": "\nQ", "chat__assistant": "\nA"})
    with config.unlocked():
        for path, value in changes.items():
            section, field = path.split("__")
            config[section][field] = value
    folder = make_workdir(tmp_path_factory.mktemp(name), config)
    people.write_jsonl(folder / f"{name}.jsonl", records)
    prepare_chats(config, folder, str(folder / f"{name}.jsonl"))
    return config, folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return folder_of(tmp_path_factory, "chats", people.chats(WORLD, 0, 40))


def rows_of(folder, name, length=60):
    return PackedRows(Corpus(folder / name / "train"), length, 10, name)


def test_a_row_holds_its_chats_token_by_token(chats):
    _, folder = chats
    rows = rows_of(folder, "chats")
    corpus = rows.corpus
    assert sorted(n for group in rows.plan for n in group) == list(range(len(corpus)))
    filled = 0
    for index, group in enumerate(rows.plan):
        row, place, chunk = rows[index], 0, 0
        for number in group:
            tokens, weights = corpus[number].tokens, corpus[number].weights
            end = place + len(tokens) - 1
            assert row.inputs[place:end].tolist() == tokens[:-1].tolist()
            assert row.targets[place:end].tolist() == tokens[1:].tolist()
            assert row.weights[place:end].tolist() == weights[1:].tolist()
            assert set(row.packing.starts[place:end]) == {place}
            assert set(row.packing.first_chunks[place:end]) == {chunk}
            place, chunk = end, chunk + -(-(end - place) // 10)
        assert chunk <= rows.chunks and len(row.references) == chunk
        assert not row.weights[place:].any() and (row.inputs[place:] == PAD).all()
        assert set(row.packing.first_chunks[place:]) <= {rows.chunks}  # padding reads no memory
        filled += place
    assert rows.padding == pytest.approx(1 - filled / (60 * len(rows)))


def test_chats_longer_than_a_row_are_refused(chats):
    _, folder = chats
    with pytest.raises(TextError, match=r"more than a row of config\.data\.sequence_length = 20"):
        rows_of(folder, "chats", 20)


@pytest.mark.parametrize("shift", [0, 1])
def test_each_chunk_searches_with_its_own_chat(chats, shift):
    config, folder = chats
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.retrieval.shift = shift
    pipeline = open_pipeline(config, folder)
    asked = []
    retrieve = pipeline.retriever.retrieve

    def remember(queries, against, k):
        asked.extend(zip(queries, against, strict=True))
        return retrieve(queries, against, k)

    pipeline.retriever.retrieve = remember
    batch = pipeline.batch(0)
    expected = []
    for row in pipeline.drawn(0):
        for number in pipeline.rows.plan[int(row)]:
            tokens = pipeline.rows.corpus[number].tokens
            for chunk in range(shift, -(-(len(tokens) - 1) // 10)):
                part = tokens[(chunk - shift) * 10 : (chunk - shift + 1) * 10]
                expected.append((pipeline.tokenizer.decode(part), tokens.tolist()))
    assert [(query, text.tolist()) for query, text in asked] == expected
    C = pipeline.rows.chunks
    assert batch.reference_ids.shape == (4, C, 1) == batch.memory.length.shape
    first = {(r, int(c)) for r, row in enumerate(batch.packing.first_chunks) for c in row if c < C}
    found = batch.reference_ids[..., 0] >= 0
    assert all(not found[place] for place in first) if shift else found.any()


def test_stored_keys_are_what_the_chunks_read(chats):
    config, folder = chats
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.retrieval.ids = "stored"
    pipeline = open_pipeline(config, folder)
    batch = pipeline.batch(1)
    for ids, row in zip(batch.reference_ids, pipeline.drawn(1), strict=True):
        keys = pipeline.rows[int(row)].references
        assert all(key.startswith("person-") for key in keys)
        assert ids[: len(keys), 0].tolist() == [pipeline.references.find(key) for key in keys]
        assert (ids[len(keys) :] == -1).all()
    rows = [pipeline.rows[int(row)] for row in pipeline.drawn(1)]
    chunks = sum(len(row.references) for row in rows)
    assert chunks < batch.reference_ids.size  # some places are none
    assert pipeline.report() == {"chunks": chunks, "chunks_without_reference": 0} | {
        name: count for name, count in pipeline.report().items() if "chunks" not in name
    }


def test_a_missing_part_names_the_script(chats):
    config, folder = chats
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.packing = "pairs"
    with pytest.raises(TextError, match=r"no finished pairs in .* run launch/prepare\.py chats"):
        open_pipeline(config, folder)


def test_a_pair_is_in_one_row_with_its_answers_in_neighbouring_slots(tmp_path_factory):
    _, folder = folder_of(
        tmp_path_factory, "pairs", people.preferences(WORLD, 0, 40, rounds=(1, 1))
    )
    rows, texts = rows_of(folder, "pairs"), {}
    for record in map(json.loads, (folder / "pairs.jsonl").read_text().splitlines()):
        texts[record["id"]] = record
    assert rows.slots == 2 * max(map(len, rows.plan)) >= 4
    tokenizer = open_pipeline(tiny_config(data__packing="pairs", memory__source="none"), folder)
    decode = tokenizer.tokenizer.decode
    for index, group in enumerate(rows.plan):
        row = rows[index]
        for pair, number in enumerate(group):
            name = rows.corpus[2 * number].id.removesuffix("/chosen")
            for slot, side in enumerate(("chosen", "rejected"), 2 * pair):
                answer = decode(row.targets[row.answers == slot]).strip()
                assert answer == texts[name][side]
        assert set(row.answers) == {-1, *range(2 * len(group))}
        assert ((row.answers >= 0) == (row.weights > 0)).all()


def test_queries_without_loss_are_the_questions(chats):
    _, folder = chats
    rows, count = rows_of(folder, "chats"), 0
    for index, group in enumerate(rows.plan):
        expected = []
        for number in group:
            tokens, weights = rows.corpus[number].tokens, rows.corpus[number].weights
            for low in range(0, len(tokens) - 1, 10):
                part, free = tokens[low : low + 10], weights[low : low + 10] == 0
                free[0] &= low > 0  # <s> is no text
                expected.append((part[free] if free.any() else part).tolist())
                count += 0 < free.sum() < 9
        assert [query.tolist() for _, query, _ in rows[index].queries(0, True)] == expected
    assert count > 20
