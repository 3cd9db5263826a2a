"""The ablations of the quickstart: what Memory³ leaves open, at the size of a laptop.

    python launch/sweep.py --sweep=configs/sweeps/quickstart.py --workdir=runs/sweep

Each entry differs from `baseline`, the quickstart with half as many steps of continual train, in
what its group says. Most begin with the same warmup. docs/ablations.md has what came out.
"""

from pathlib import Path
from typing import Any

from configs import quickstart
from m3jax import flops
from m3jax.config import ConfigDict
from m3jax.quickstart import sweep_data
from m3jax.sweep.spec import Entry, Sweep

STEPS = 400  # of continual train
# 8 tokens a head, 2 for each and the rest where a second copy looks: the warmup of seed 0 by
# launch/select_memory.py counts --budget=8 --each=2; seeds 1 and 2 exchange the 8 and a 9.
COUNTS = "0:4+9+9+9,1:9+8+9+7"

# Layers, query heads, head dim and hidden width: from twice as many layers as heads to half as
# many, with 0.88 to 0.97M parameters besides the embedding (the quickstart: 4, 4, 64, 128; 0.92M).
SHAPES = ((6, 3, 64, 112), (3, 6, 64, 128), (4, 2, 128, 128), (4, 8, 32, 128))

# Chunks search for their references; at any overlap, since a row states what its reference does.
SEARCH = {"continual:retrieval.ids": "search", "continual:retrieval.overlap_train": 1.0}


# 11 bytes a vector: the paper's 14 want more vectors than these 265 000 to be trained on.
COMPRESSION: dict[str, dict[str, Any]] = {
    "int8": {"writer.compression": "int8"},
    "vector": {"writer.compression": "vector", "writer.coarse_bits": 10, "writer.fine_bits": 8},
}


def prepare(config: ConfigDict, folder: Path, knowledge: str) -> None:
    """Invented people; with `documents`, four of them in each document."""
    sweep_data.prepare(config, folder, knowledge, quickstart.WORLD)


def get_sweep() -> Sweep:
    """The sweep."""
    return Sweep(
        config="configs/quickstart.py",
        entries=[Entry("baseline", group="quickstart"), *_memories(), *_rest()],
        changes={"continual:train.steps": STEPS},
        # The losses of all entries are of the same task, on all validation rows.
        read={"retrieval.ids": "stored", "evaluation.batches": 32},
        seeds=(0, 1, 2),
        prepare=prepare,
        questions=sweep_data.QUESTIONS,
        in_context=sweep_data.IN_CONTEXT,
    )


def _memories() -> list[Entry]:
    """Lists entries on the source of memories and on their content."""
    group, kept = "memories in continual train (baseline: precomputed)", "memory.kept_tokens"
    refresh = {"continual:train.refresh_every": STEPS // 2, "continual:train.keep_every": 200}
    entries = [
        Entry("online", {"continual:memory.source": "online"}, group),
        Entry("stop-gradient", {"continual:memory.source": "stop_gradient"}, group),
        Entry("refreshed", refresh, group),
    ]
    group = "kept tokens of a reference's 9 (baseline: 8)"
    entries += [Entry(f"kept-{count}", {kept: count}, group) for count in (1, 2, 4, 16)]
    group = "token weight (baseline and kept-…: exact)"
    approximate = {"memory.selection": "approximate"}
    entries += [Entry(f"approximate-{n}", {kept: n, **approximate}, group) for n in (2, 4)]
    group = "memory layers of 4 (baseline: the first 2)"
    for name, first, count in (("1", 0, 1), ("2-3", 1, 2), ("3-4", 2, 2), ("1-4", 0, 4)):
        layers = {"memory.first_layer": first, "memory.layers": count}
        entries.append(Entry(f"layers-{name}", layers, group))
    group = "memory heads (baseline: the 4 of both memory layers)"
    for name, heads in (("second-layer", "1"), ("half-of-each", "0:0+1,1:0+1")):
        entries.append(Entry(f"heads-{name}", {"memory.heads": heads}, group))
    dealt = {"memory.counts": COUNTS, "memory.each": 2, "memory.selection": "reconstruction"}
    entries.append(Entry("heads-counts", dealt, group))
    return entries


def _rest() -> list[Entry]:
    """Lists entries on queries, encoding and storage of references, stages, and shapes."""
    group = "retrieval in training (baseline: the reference that the text was made from)"
    entries = [
        Entry("shift-0", {**SEARCH, "retrieval.shift": 0}, group),
        Entry("shift-1", {**SEARCH, "retrieval.shift": 1}, group),
        Entry(
            "shift-0-filtered",
            {**SEARCH, "retrieval.shift": 0, "continual:retrieval.overlap_train": 0.9},
            group,
        ),
    ]
    context = {"writer.document_context": True, "writer.document_context_tokens": 4 * 32}
    entries.append(
        Entry(
            "contextual",
            context,
            "encoding of references (baseline: each alone)",
            knowledge=sweep_data.IN_DOCUMENTS,
        )
    )
    group = "stored memories after training (baseline: float32)"
    entries += [Entry(name, {}, group, read=read) for name, read in COMPRESSION.items()]
    group = "stages, at equal compute (baseline: warmup, then memories)"
    scratch = {"scratch:train.steps": equal_steps()}
    entries.append(Entry("from-scratch", scratch, group, stages=("scratch",)))
    group = "layers x heads x head dim (baseline: 4x4x64)"
    for layers, heads, head_dim, hidden in SHAPES:
        shape = {
            "model.layers": layers,
            "model.query_heads": heads,
            "model.kv_heads": heads,
            "model.head_dim": head_dim,
            "model.hidden": hidden,
            "model.mlp_width": 2 * hidden,
            "memory.layers": layers // 2,
        }
        entries.append(Entry(f"shape-{layers}x{heads}x{head_dim}", shape, group))
    return entries


def equal_steps() -> int:
    """Steps with memories from the start that are as much work as both stages."""
    warmup, continual, scratch = (
        quickstart.get_config(f"stage={stage}") for stage in ("warmup", "continual", "scratch")
    )
    work = flops.train_step(warmup) * warmup.train.steps + flops.train_step(continual) * STEPS
    return int(work / flops.train_step(scratch))
