"""A tiny prepared workdir: people as text, references, index, a bank of random weights."""

from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from m3jax.config import PREFIX_TOKENS, default, validate
from m3jax.make_model import make_model
from m3jax.memory.write import write_bank
from m3jax.quickstart import people
from m3jax.retrieval.build import build_index
from m3jax.retrieval.embed import make_embedder
from m3jax.text.prepare import prepare_text
from m3jax.text.references import References

WORLD = people.make_world(3, names=12, people=60, unseen=20, values=4, facts=2)


def tiny_config(**changes: Any) -> ConfigDict:
    """Rows of 6 chunks of 10 tokens; `memory__source="online"` changes a field."""
    values = {
        "model__layers": 2,
        "model__hidden": 16,
        "model__head_dim": 8,
        "model__query_heads": 2,
        "model__kv_heads": 2,
        "model__mlp_width": 24,
        "model__vocabulary": 704,  # splits over eight devices
        "model__tied_embeddings": True,
        "model__prefix": "always",
        "memory__layers": 1,
        "memory__source": "precomputed",
        "memory__reference_length": 9,
        "memory__kept_tokens": 4,
        "memory__chunk_length": 10,
        "memory__dtype": "float32",
        "writer__batch_references": 16,
        "writer__shard_memories": 16,
        "text__vocabulary": 700,
        "text__shards": 2,
        "text__validation_share": 0.2,
        "retrieval__shift": 1,
        "retrieval__candidates": 8,
        "data__sequence_length": 60,
        "data__batch_size": 4,
        "evaluation__batch_size": 4,
        "evaluation__batches": 2,
        "train__steps": 4,
        "optimizer__lr_warmup_steps": 1,
    }
    config = default()
    with config.unlocked():
        for path, value in {**values, **changes}.items():
            *section, field = path.split("__")
            (config[section[0]] if section else config)[field] = value
    return validate(config)


def write_text(folder: Path) -> tuple[str, str]:
    """Documents and knowledge base as files; their paths."""
    documents = [
        *people.fact_documents(WORLD, 0, 60, chunks=6),
        *people.echo_documents(WORLD, 0, 60, words=59),
    ]
    people.write_jsonl(folder / "documents.jsonl", documents)
    everyone = (*WORLD.people, *WORLD.unseen)
    people.write_jsonl(folder / "knowledge.jsonl", people.knowledge(everyone))
    return str(folder / "documents.jsonl"), str(folder / "knowledge.jsonl")


def make_workdir(folder: Path, config: ConfigDict, texts: tuple[str, str] | None = None) -> Path:
    """Prepares everything a pipeline opens; `texts` are documents and knowledge base."""
    prepare_text(config, folder, *(texts or write_text(folder)), say=lambda line: None)
    references = References(folder / "references")
    build_index(references, make_embedder(config), folder / "index", config)
    model = make_model(config, PREFIX_TOKENS)
    write_bank(
        config,
        model,
        jax.jit(model.init)(jax.random.key(0)),
        references,
        folder / "bank",
        progress=False,
    )
    return folder
