"""Compressed banks: what they hold, what they cost, and whose codebooks they accept."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data.data_workdir import make_workdir
from data.data_workdir import tiny_config as workdir_config
from memory.memory_tiny import TinyReferences, build, flip, shard_files, tiny_config, tiny_params
from memory_axes import by_reference

from m3jax import flops
from m3jax.config import PREFIX_TOKENS
from m3jax.data.pipeline import open_pipeline
from m3jax.errors import BankError
from m3jax.files import checksum
from m3jax.make_model import make_model
from m3jax.memory import codec as codecs
from m3jax.memory import quantizer, storage
from m3jax.memory.bank import Bank
from m3jax.memory.codec import Codec
from m3jax.mesh import make_mesh
from m3jax.model.attention_mask import ExplicitMemory
from m3jax.train.evaluator import evaluator

ROOT = Path(__file__).parents[2]
IDS = np.arange(37)


def config_of(compression: str, **changes: Any) -> Any:
    return tiny_config(
        writer__compression=compression, writer__coarse_bits=4, writer__fine_bits=3, **changes
    )


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same references, stored in the three ways; no test changes them."""
    folder = tmp_path_factory.mktemp("codec")
    for name in ("none", "int8", "vector"):
        build(folder / name, config_of(name))
    return {name: folder / name for name in ("none", "int8", "vector")}


@pytest.fixture
def own(banks: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(banks["vector"], tmp_path / "bank"))


def real(memory: ExplicitMemory) -> np.ndarray:
    """Keys and values of the real slots, `(2, n, H)`."""
    shown = np.arange(memory.keys.shape[-2]) < np.asarray(memory.length)[:, None]
    parts = (x.transpose(0, 3, 1, 2, 4)[shown] for x in by_reference(memory)[:2])
    return np.stack([part.reshape(-1, part.shape[-1]) for part in parts])


def test_int8_is_the_nearest_multiple_of_a_scale() -> None:
    x = np.random.default_rng(0).normal(size=(50, 2, 1, 1, 3, 16)).astype(np.float32)
    x *= 10.0 ** np.random.default_rng(1).integers(-6, 6, (50, 2, 1, 1, 3, 1))
    x[3] = 0
    codec = Codec("int8", 16, "float32")
    codes = np.asarray(codec.quantize(jnp.asarray(x)))
    assert codes.shape == (*x.shape[:-1], 18) and codes.dtype == np.uint8
    scale = np.abs(codes[..., -2:].copy().view(jnp.bfloat16).astype(np.float32))
    found = codec.dequantize(ExplicitMemory(codes[:, 0], codes[:, 1], np.zeros(50)))
    for part, decoded in enumerate((found.keys, found.values)):
        error = np.abs(np.asarray(decoded) - x[:, part])
        assert (error <= 0.5001 * scale[:, part]).all()
    largest = np.abs(x).max(-1, keepdims=True)
    assert (scale <= largest / 127 * 1.01).all()  # no resolution is given away
    assert not np.asarray(found.keys)[3].any()


@pytest.mark.slow
def test_errors_are_as_small_as_they_should_be(banks: dict[str, Path]) -> None:
    expected = real(Bank.open(banks["none"]).read(IDS))
    power = (expected**2).sum((1, 2))
    error = {}
    for name in ("int8", "vector"):
        found = real(Bank.open(banks[name]).read(IDS))
        error[name] = ((found - expected) ** 2).sum((1, 2)) / power
    assert (error["int8"] < 1e-4).all() and (error["int8"] > 0).all()
    assert (error["vector"] < 0.1).all() and (error["vector"] > error["int8"]).all()


@pytest.mark.slow
def test_banks_hold_what_codecs_make_of_memories(banks: dict[str, Path]) -> None:
    memory = Bank.open(banks["none"]).read(IDS)
    both = jnp.stack(by_reference(memory)[:2], axis=1)
    for name, bytes_each in (("int8", 8 + 2), ("vector", 1 + 3)):
        bank = Bank.open(banks[name])
        stored = by_reference(bank.read_stored(IDS))
        assert stored.keys.shape[-1] == bytes_each and stored.keys.dtype == np.uint8
        assert bank.bytes == 37 * 2 * 2 * 2 * 4 * bytes_each
        codes = np.asarray(bank.codec.quantize(both))
        np.testing.assert_array_equal(stored.keys, codes[:, 0])
        np.testing.assert_array_equal(stored.values, codes[:, 1])
        np.testing.assert_array_equal(stored.length, memory.length)
        assert sum(map(len, shard_files(banks[name]).values())) < bank.bytes + 37 * 4 + 4 * 200


def test_keys_and_values_have_codebooks_of_their_own(banks: dict[str, Path]) -> None:
    books = Bank.open(banks["vector"]).codec.codebooks
    assert books is not None and not np.array_equal(books[0].coarse, books[1].coarse)
    expected = real(Bank.open(banks["none"]).read(IDS))
    error = [
        [quantizer.relative_error(book, x, quantizer.quantize(book, x)) for book in books]
        for x in expected
    ]
    assert error[0][0] < error[0][1] and error[1][1] < error[1][0]


def test_a_killed_build_keeps_its_codebooks(own: Path, banks: dict[str, Path]) -> None:
    """Trained, but no manifest yet; then with a manifest and missing shards."""
    book = (own / storage.CODEBOOK).read_bytes()
    shutil.rmtree(own)
    own.mkdir()
    (own / storage.CODEBOOK).write_bytes(book)
    build(own, config_of("vector"))
    assert shard_files(own) == shard_files(banks["vector"])
    (own / storage.shard_key(1)).unlink()
    (own / storage.COMPLETE).unlink()
    build(own, config_of("vector"))
    assert shard_files(own) == shard_files(banks["vector"])
    assert (own / storage.CODEBOOK).read_bytes() == book


@pytest.mark.slow
def test_codebooks_of_other_weights_are_trained_anew(own: Path) -> None:
    book = (own / storage.CODEBOOK).read_bytes()
    shutil.rmtree(own)
    own.mkdir()
    (own / storage.CODEBOOK).write_bytes(book)
    build(own, config_of("vector"), weights=1)
    assert (own / storage.CODEBOOK).read_bytes() != book


@pytest.mark.parametrize("base", ["none", "int8", "vector"])
def test_a_base_is_compressed_or_copied(banks: dict[str, Path], tmp_path: Path, base: str) -> None:
    report = build(tmp_path / "bank", config_of("vector"), base=Bank.open(banks[base]))
    assert report["copied"] == 37 and report["encoded"] == 0
    ours, theirs = Bank.open(tmp_path / "bank"), Bank.open(banks[base])
    if base == "vector":  # same codebooks, same codes
        assert shard_files(tmp_path / "bank") == shard_files(banks["vector"])
    expected, found = real(theirs.read(IDS)), real(ours.read(IDS))
    assert ((found - expected) ** 2).sum() < 0.1 * (expected**2).sum()


def test_a_small_edit_uses_the_codebooks_of_its_base(
    banks: dict[str, Path], tmp_path: Path
) -> None:
    """Three references are too few to train on."""
    few = TinyReferences(3, seed=9)
    build(tmp_path / "bank", config_of("vector"), references=few, base=Bank.open(banks["vector"]))
    ours, theirs = Bank.open(tmp_path / "bank"), Bank.open(banks["vector"])
    assert codecs.same(ours.codec, theirs.codec)
    with pytest.raises(BankError, match="training vectors for codebooks of"):
        config = config_of("vector", writer__batch_references=16)
        config.writer.coarse_bits = 14
        build(tmp_path / "alone", config, references=few)


@pytest.mark.slow
def test_on_a_mesh(banks: dict[str, Path], tmp_path: Path) -> None:
    config = config_of("vector")
    config.mesh.fsdp, config.mesh.tensor, config.mesh.data = 2, 2, 2
    base = Bank.open(banks["vector"])
    expected = real(base.read(IDS))
    shutil.copy(banks["vector"] / storage.CODEBOOK, tmp_path / storage.CODEBOOK)
    build(tmp_path, config, mesh=make_mesh(config))
    found = real(Bank.open(tmp_path).read(IDS))
    # Sums in another order: a code may differ where two entries are equally near.
    same = np.abs(found - expected) <= 1e-4 * np.abs(expected).max()
    assert same.all(-1).mean() > 0.98


def test_weights_that_diverged_are_refused(tmp_path: Path) -> None:
    config = config_of("none")
    params = tiny_params(config)
    params["embedding"] = np.where(np.arange(260)[:, None] == 7, np.nan, params["embedding"])
    for compression in ("none", "int8"):
        with pytest.raises(BankError, match=r"memory of reference \d+ holds NaN or infinity"):
            build(tmp_path / compression, config_of(compression), params=params)
        assert not (tmp_path / compression / storage.COMPLETE).exists()


def test_another_compression_in_the_folder_is_refused(own: Path) -> None:
    with pytest.raises(BankError, match="config.writer.compression = 'vector', here 'int8'"):
        build(own, config_of("int8"))


def test_a_damaged_or_missing_codebook_is_named(own: Path) -> None:
    flip(own / storage.CODEBOOK, 500)
    with pytest.raises(BankError, match="codebook.npz is damaged"):
        Bank.open(own)
    (own / storage.CODEBOOK).unlink()
    with pytest.raises(BankError, match="codebook.npz is missing"):
        Bank.open(own)


@pytest.mark.slow
def test_codebooks_of_another_model_are_refused(own: Path, tmp_path: Path) -> None:
    build(tmp_path / "other", config_of("vector"), weights=1)
    data = (tmp_path / "other" / storage.CODEBOOK).read_bytes()
    (own / storage.CODEBOOK).write_bytes(data)
    manifest = json.loads((own / storage.MANIFEST).read_text())
    manifest["checksums"][storage.CODEBOOK] = checksum(data)
    text = json.dumps(manifest).encode()
    (own / storage.MANIFEST).write_bytes(text)
    (own / storage.COMPLETE).write_bytes(storage.complete_stamp(text))
    with pytest.raises(BankError, match="belongs to memories of another model"):
        Bank.open(own)


@pytest.mark.parametrize("compression", ["int8", pytest.param("vector", marks=pytest.mark.slow)])
def test_a_step_decodes_what_the_bank_stores(tmp_path: Path, compression: str) -> None:
    """Batches carry codes, and losses are those of decoded memories."""
    config = workdir_config(
        writer__compression=compression, writer__coarse_bits=3, writer__fine_bits=2
    )
    workdir = make_workdir(tmp_path, config)
    pipeline = open_pipeline(config, workdir, split="validation")
    assert pipeline.bank is not None and pipeline.dequantize is not None
    evaluate, params = (
        evaluator(config, workdir),
        jax.jit(make_model(config, PREFIX_TOKENS).init)(jax.random.key(1)),
    )
    found = evaluate(params)
    batches = [pipeline.batch(step) for step in range(evaluate.batches)]
    assert all(batch.memory.keys.dtype == np.uint8 for batch in batches)
    with jax.transfer_guard("disallow"):  # as in the training loop, where a step is compiled
        jax.jit(pipeline.dequantize).lower(batches[0].memory)
    loss = weight = 0.0
    read = jax.jit(make_model(config, PREFIX_TOKENS).logits)
    for batch in batches:
        memory = jax.tree.map(jnp.asarray, pipeline.bank.read(batch.reference_ids))
        logits = read(params, jnp.asarray(batch.tokens), memory)
        picked = jnp.take_along_axis(
            jax.nn.log_softmax(logits), jnp.asarray(batch.targets)[..., None], axis=-1
        )[..., 0]
        loss -= float((picked * batch.weights).sum())
        weight += float(batch.weights.sum())
    assert found["loss_memory"] == pytest.approx(loss / weight, rel=1e-5)
    assert abs(found["loss_memory"] - found["loss_none"]) > 1e-4


@pytest.mark.slow
def test_storage_of_the_paper_by_the_real_writer(tmp_path: Path) -> None:
    """Files of memories of the 2.4B shape (only the width of the hidden states is small): 160
    times and 1830 times less than all keys and values, for 1.12e8 references 45.9 and 4.02 TiB."""
    paper = load_paper()
    config = tiny_config(
        model__layers=23,
        model__hidden=16,
        model__query_heads=40,
        model__kv_heads=8,
        model__head_dim=80,
        memory__first_layer=0,
        memory__layers=22,
        memory__kept_tokens=8,
        memory__dtype="bfloat16",
        writer__batch_references=2,
        writer__shard_memories=2,
    )
    references, tebi, count = TinyReferences(2), 2.0**40, 1.12e8
    plain = _bytes_of_files(tmp_path / "plain", config, references)
    random = np.random.default_rng(0)
    tables = [random.normal(size=shape) for shape in ((80, 80), (2, 2**14, 40), (8, 2**10, 10))]
    book = quantizer.Codebook(*(jnp.asarray(table, jnp.float32) for table in tables))
    codec = Codec("vector", 80, "bfloat16", (book, book))
    owner = Bank.open(tmp_path / "plain").binding.owner
    (tmp_path / "vector").mkdir()
    (tmp_path / "vector" / storage.CODEBOOK).write_bytes(codecs.to_bytes(codec, owner))
    config.writer.compression = "vector"
    vector = _bytes_of_files(tmp_path / "vector", config, references)
    full = flops.full_memory_bytes(paper)
    assert (full / plain, full / vector, plain / vector) == pytest.approx(
        (160, 1830, 11.4), rel=4e-3
    )
    expected = [count * flops.memory_bytes(paper, width) / tebi for width in (None, 14)]
    assert expected == pytest.approx([45.9, 4.02], rel=3e-3)
    assert [count * size / tebi for size in (plain, vector)] == pytest.approx(expected, rel=2e-3)


def _bytes_of_files(folder: Path, config: Any, references: TinyReferences) -> float:
    """Bytes on disk for one memory."""
    build(folder, config, references=references)
    return sum(map(len, shard_files(folder).values())) / len(references)


def load_paper() -> Any:
    spec = importlib.util.spec_from_file_location("memory3", ROOT / "configs" / "memory3.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config("stage=continual")
