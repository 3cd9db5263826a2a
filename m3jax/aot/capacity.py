"""Capacity plans: computes the resources that a config needs on a TPU slice, without measurements.

`capacity_plan` turns a config and assumptions into sections of quantities, each with its unit and
its formula in words. Bytes and FLOP are counted from the config (`m3jax.flops`), speeds are
data-sheet figures (`m3jax.hardware`), and utilisation is an assumption.

Every time is `FLOP / (chips · peak FLOP/s · mfu)`. The bytes of a bank count memories with all
slots filled, without checksums and manifest (about 30 bytes per memory).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from m3jax import flops
from m3jax.config import slot_counts
from m3jax.errors import ConfigError
from m3jax.hardware import Chip, chip_of_topology

_HOUR, _DAY = 3600.0, 86_400.0
_BFLOAT16 = 2  # bytes per number in decoding
# Bytes per dimension of an embedding that ScaNN 1.4.2 holds for its codes, besides the embeddings
# for final scores. Codes have 4 bits per two dimensions, or per four dimensions in two clusters,
# and are stored both one per byte and packed. Measured with 60 000 embeddings, with and without
# clusters: the process grew by 0.69 to 0.80 bytes per dimension.
_CODE_BYTES = 0.75
_MOST_REFERENCES = 1e15
# Bytes/s that a host gets from a bucket: the lower end of 94–137 MB/s, published for KV caches read
# from Cloud Storage; not measured by us.
BUCKET = 94e6

# For each number in `Assumptions`: a test of its value, and the accepted values in words.
_SIZE = (lambda value: 0 < value < math.inf, "a finite number of bytes above 0")
_COUNT = (lambda value: value >= 1, "at least 1")
_ACCEPTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "references": (
        lambda value: 1 <= value <= _MOST_REFERENCES and value % 1 == 0,
        f"a whole number from 1 to {_MOST_REFERENCES:g}, for example 1.1e8",
    ),
    "mfu": (lambda value: 0 < value <= 1, "a share of the peak in (0, 1], for example 0.4"),
    "bytes_per_vector": _SIZE,
    "host_bandwidth": _SIZE,
    "price_per_chip_hour": (lambda value: 0 <= value < math.inf, "finite and at least 0"),
    "chips_per_host": _COUNT,
    "decode_batch": _COUNT,
    "decode_length": _COUNT,
}


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """Assumptions of a capacity plan about the machine and its use.

    Attributes:
      topology: name of a TPU slice, such as `v5e:16x16`.
      references: number R of references in the knowledge base.
      bytes_per_vector: bytes of one compressed key or value vector; the paper's quantizer uses 14.
      mfu: assumed model FLOPs utilisation of training and writing: useful FLOP/s over peak.
      chips_per_host: chips per host process; 4 on TPU slices of several hosts.
      host_bandwidth: bytes/s that a host can read from or write to the bank's storage; None: the
        data sheet's network bandwidth, if it has one.
      price_per_chip_hour: price of a chip-hour in any currency; None: no costs are computed.
      decode_batch: number of rows decoded together.
      decode_length: tokens of such a row, prompt included; None: `data.sequence_length`.

    Raises:
      ConfigError: the topology is unknown, or a number is out of its range; the message names the
        flag and the range.
    """

    topology: str
    references: float
    bytes_per_vector: float = 14.0
    mfu: float = 0.4
    chips_per_host: int = 4
    host_bandwidth: float | None = None
    price_per_chip_hour: float | None = None
    decode_batch: int = 32
    decode_length: int | None = None

    def __post_init__(self) -> None:
        chip_of_topology(self.topology)
        for name, (good, words) in _ACCEPTED.items():
            value = getattr(self, name)
            if value is not None and not good(value):
                raise ConfigError(f"--{name}={value}: must be {words}")

    @property
    def chip(self) -> Chip:
        """Data sheet of the slice's chips."""
        return chip_of_topology(self.topology)[0]

    @property
    def chips(self) -> int:
        """Number of chips of the slice."""
        return math.prod(chip_of_topology(self.topology)[1])

    @property
    def hosts(self) -> int:
        """Number of hosts of the slice; the last one may have fewer chips."""
        return -(-self.chips // self.chips_per_host)

    def seconds(self, work: float) -> float:
        """Returns the seconds for `work` FLOP: work / (chips · peak FLOP/s · mfu)."""
        return work / (self.chips * self.chip.flops * self.mfu)


class Quantity(NamedTuple):
    """Quantity of a capacity plan.

    Attributes:
      value: value in `unit`; None if it is unknown.
      unit: `bytes`, `bytes/s`, `s`, `hours`, `FLOP`, `share` (a fraction of 1), `yes/no`, `cost`
        (in the currency of the price), `count` (of the items in the quantity's name), or the name
        of the counted items.
      formula: derivation of the value in words.
    """

    value: float | int | bool | None
    unit: str
    formula: str


Section = dict[str, Quantity]


def capacity_plan(config: ConfigDict, assumptions: Assumptions) -> dict[str, Section]:
    """Returns the sections of the capacity plan of a validated config, by title."""
    return {
        "bank": bank(config, assumptions),
        "writing the bank": writing(config, assumptions),
        "training": training(config, assumptions),
        "reading memories in training": reading(config, assumptions),
        "index": index(config, assumptions),
        "decoding": decoding(config, assumptions),
        "cost model": cost_model(config),
    }


# -- sections --------------------------------------------------------------------------------------
def bank(config: ConfigDict, assumptions: Assumptions) -> Section:
    """Counts the bytes of the bank and its files, and the factors that sparsity saves (Memory³ on
    sparsity and storage).

    A key or value vector has head_dim numbers of `memory.dtype`, or, compressed, `bytes_per_vector`
    bytes.
    """
    references, vector = assumptions.references, assumptions.bytes_per_vector
    shard = min(references, config.writer.shard_memories)
    raw, small = flops.memory_bytes(config), flops.memory_bytes(config, vector)
    full = flops.full_memory_bytes(config)
    raw_vector = raw / flops.memory_bytes(config, 1.0)
    files = math.ceil(references / config.writer.shard_memories)
    heads = "memory heads" if config.memory.heads else "memory layers · kv heads"
    kept = f"2 · {heads} · kept tokens ·"
    every = "2 · layers · query heads · reference tokens ·"
    per_file = "writer.shard_memories · memory"
    return {
        "references": Quantity(int(references), "count", "--references"),
        "memory_full": Quantity(full, "bytes", f"{every} {raw_vector:g} bytes"),
        "memory": Quantity(raw, "bytes", f"{kept} {raw_vector:g} bytes"),
        "memory_compressed": Quantity(small, "bytes", f"{kept} {vector:g} bytes"),
        "bank_full": Quantity(references * full, "bytes", "references · memory full"),
        "bank": Quantity(references * raw, "bytes", "references · memory"),
        "bank_compressed": Quantity(references * small, "bytes", "references · memory compressed"),
        "sparsity": Quantity(full / raw, "times", "bank full / bank"),
        "sparsity_compressed": Quantity(full / small, "times", "bank full / bank compressed"),
        "shard_files": Quantity(files, "count", "references / writer.shard_memories, rounded up"),
        "shard": Quantity(shard * raw, "bytes", per_file),
        "shard_compressed": Quantity(shard * small, "bytes", f"{per_file} compressed"),
    }


def writing(config: ConfigDict, assumptions: Assumptions) -> Section:
    """Estimates the time to write the bank, without the quantizer's work, and the bandwidth that
    its storage needs."""
    references = int(assumptions.references)
    work = flops.writer(config, references)
    seconds = assumptions.seconds(work)
    return {
        "work": Quantity(work, "FLOP", "memory layers over every reference at full length"),
        "time": Quantity(seconds, "s", "work / (chips · peak · mfu)"),
        "speed": Quantity(references / seconds, "memories/s", "references / time"),
        **_traffic("write", "bank{} / time", config, assumptions, references / seconds),
        **_cost(seconds, assumptions),
    }


def training(config: ConfigDict, assumptions: Assumptions) -> Section:
    """Estimates speed, duration and cost of `train.steps` optimizer steps, without evaluation,
    checkpoints and restarts."""
    work, steps = flops.train_step(config), config.train.steps
    seconds = assumptions.seconds(work)
    tokens = config.data.batch_size * config.data.sequence_length
    daily = tokens / seconds * _DAY
    return {
        "step_work": Quantity(work, "FLOP", "useful products, forward and backward"),
        "step_time": Quantity(seconds, "s", "step work / (chips · peak · mfu)"),
        "step_tokens": Quantity(tokens, "tokens", "data.batch_size · data.sequence_length"),
        "tokens_a_day": Quantity(daily, "tokens/day", "step tokens / step time · 86400"),
        "steps": Quantity(steps, "count", "train.steps"),
        "tokens": Quantity(steps * tokens, "tokens", "steps · step tokens"),
        "time": Quantity(steps * seconds, "s", "steps · step time"),
        **_cost(steps * seconds, assumptions),
    }


def reading(config: ConfigDict, assumptions: Assumptions) -> Section:
    """Counts the memories and bytes that hosts read from the bank during training.

    The counts are upper bounds: chunks that `memory.dropout` hides and repeated references count,
    too.
    """
    memories, words = 0, f"none are read with memory.source = {config.memory.source}"
    if config.memory.source == "precomputed":
        chunks = config.data.sequence_length // config.memory.chunk_length
        memories = config.data.batch_size * chunks * config.memory.per_chunk
        words = "data.batch_size · chunks of a row · memory.per_chunk"
    speed = memories / assumptions.seconds(flops.train_step(config))
    formula = "memories a step · memory{} / step time"
    section = {
        "memories_a_step": Quantity(memories, "count", words),
        **_traffic("read", formula, config, assumptions, speed),
        "bucket": Quantity(
            BUCKET, "bytes/s", "a host from a bucket: lower end of published 94–137"
        ),
    }
    for which in ("", "_compressed"):
        enough = (section[f"read_per_host{which}"].value or 0) <= BUCKET
        words = f"read per host{which.replace('_', ' ')} ≤ bucket"
        section[f"bucket_suffices{which}"] = Quantity(enough, "yes/no", words)
    return section


def bucket_warning(config: ConfigDict, assumptions: Assumptions) -> str:
    """Returns what to do where a bank in a bucket would slow training down; "" if it would not."""
    section = reading(config, assumptions)
    if section["bucket_suffices"].value:
        return ""
    remedy = "read it from disks or servers nearer to the hosts, or take fewer memories a chunk"
    if section["bucket_suffices_compressed"].value:
        size = readable(section["read_per_host_compressed"])
        remedy = f"compress it: --config.writer.compression=vector needs {size}"
    return (
        f"a bank in a bucket would slow training down: a host needs"
        f" {readable(section['read_per_host'])} of it, and buckets are known to give"
        f" {readable(section['bucket'])}; {remedy}"
    )


def index(config: ConfigDict, assumptions: Assumptions) -> Section:
    """Counts the RAM of the whole search index; a host holds only the shards that it searches.

    ScaNN keeps its codes, and embeddings for final scores in float32 or int8. Its clusters add less
    than 1 % for large sets.
    """
    numbers = assumptions.references * config.retrieval.dimension
    words = "references · retrieval.dimension ·"
    section = {"embeddings": Quantity(numbers * 4, "bytes", f"{words} 4: the exact search")}
    for dtype, size in (("float32", 4), ("int8", 1)):
        formula = f"{words} ({size} + {_CODE_BYTES}), an estimate"
        section[f"scann_{dtype}"] = Quantity(numbers * (size + _CODE_BYTES), "bytes", formula)
    return section


def decoding(config: ConfigDict, assumptions: Assumptions) -> Section:
    """Counts the device RAM (HBM) of decoding in bfloat16, without activations: on one chip, and
    split evenly over the slice.

    Every row has the memories of the chunk that is being decoded.
    """
    model, memory, batch = config.model, config.memory, assumptions.decode_batch
    length = assumptions.decode_length or config.data.sequence_length
    parameters = flops.parameters(config).total
    vector = model.kv_heads * model.head_dim * 2 * _BFLOAT16
    cache = batch * length * model.layers * vector
    slots = int(slot_counts(model, memory).max(1).sum())
    memories = batch * memory.per_prompt_chunk * slots * vector
    weights = parameters * _BFLOAT16
    total = weights + cache + memories
    sharded, available = total / assumptions.chips, assumptions.chip.memory
    rows = f"{batch} rows ·"
    return {
        "parameters": Quantity(parameters, "count", "embedding and LM head included"),
        "weights": Quantity(weights, "bytes", "parameters · 2 (bfloat16)"),
        "cache": Quantity(cache, "bytes", f"{rows} {length} tokens · layers · keys and values"),
        "memories": Quantity(
            memories, "bytes", f"{rows} memory.per_prompt_chunk · memory in bfloat16"
        ),
        "total": Quantity(total, "bytes", "weights + cache + memories"),
        "chip_memory": Quantity(available, "bytes", f"data sheet of {assumptions.chip.name}"),
        "fits_one_chip": Quantity(total <= available, "yes/no", "total ≤ chip memory"),
        "sharded": Quantity(sharded, "bytes", "total / chips"),
        "fits_sharded": Quantity(sharded <= available, "yes/no", "sharded ≤ chip memory"),
    }


def cost_model(config: ConfigDict) -> Section:
    """Computes the figures of the paper's cost model for this config (Memory³ §2 and appendix).

    For a reference that is used less than `uses_from` times, text in the context (RAG) is cheaper
    than explicit memory; if it is used more than `uses_to` times, training it into the parameters.
    """
    low, high = flops.usage_interval(config)
    share = flops.prompt_read_share(config, 4 * config.memory.chunk_length)
    return {
        "read_share": Quantity(share, "share", "reading memories / layers of four prompt chunks"),
        "uses_from": Quantity(low, "uses", "explicit write / (text read − explicit read)"),
        "uses_to": Quantity(high, "uses", "(implicit write − explicit write) / explicit read"),
    }


def _traffic(
    verb: str, formula: str, config: ConfigDict, assumptions: Assumptions, memories: float
) -> Section:
    """Compares the bytes/s of `memories` per second, in total and for a host with all its chips,
    with the bandwidth of a host's network."""
    chip, chips = assumptions.chip, assumptions.chips
    of_host = min(chips, assumptions.chips_per_host)
    available = assumptions.host_bandwidth or chip.network * of_host or None
    source = f"chips of a host · data sheet of {chip.name}"
    if assumptions.host_bandwidth:
        source = "--host_bandwidth"
    elif available is None:
        source = f"not known of {chip.name}; give --host_bandwidth"
    section = {"host_network": Quantity(available, "bytes/s", source)}
    for which, vector in (("", None), (" compressed", assumptions.bytes_per_vector)):
        total = memories * flops.memory_bytes(config, vector)
        per_host = total * of_host / chips
        share = None if available is None else per_host / available
        share = 0.0 if per_host == 0 else share  # without traffic any network suffices
        suffices = None if share is None else share <= 1
        of_chips = f"{verb}{which} · chips of a host / chips"
        figures = {
            verb: Quantity(total, "bytes/s", formula.format(which)),
            f"{verb}_per_host": Quantity(per_host, "bytes/s", of_chips),
            "network_share": Quantity(share, "share", f"{verb} per host{which} / host network"),
            "network_suffices": Quantity(suffices, "yes/no", "network share ≤ 1"),
        }
        section |= {key + which.replace(" ", "_"): value for key, value in figures.items()}
    return section


def _cost(seconds: float, assumptions: Assumptions) -> Section:
    """Computes chip hours and, if there is a price, their cost: hours · chips · price."""
    hours, price = seconds / _HOUR * assumptions.chips, assumptions.price_per_chip_hour
    section = {"chip_hours": Quantity(hours, "hours", "time · chips")}
    if price is not None:
        section["cost"] = Quantity(hours * price, "cost", "chip hours · --price_per_chip_hour")
    return section


# -- showing ---------------------------------------------------------------------------------------
def capacity_report(config: ConfigDict, assumptions: Assumptions) -> dict[str, Any]:
    """Returns the capacity plan as plain values for JSON, with the config's name and stage, the
    assumptions and the slice."""
    return {
        "config": config.name,
        "stage": config.stage,
        "assumptions": dataclasses.asdict(assumptions),
        "slice": {
            "chip": assumptions.chip.name,
            "chips": assumptions.chips,
            "hosts": assumptions.hosts,
        },
        "quantities": {
            title: {name: quantity._asdict() for name, quantity in section.items()}
            for title, section in capacity_plan(config, assumptions).items()
        },
    }


def capacity_table(config: ConfigDict, assumptions: Assumptions) -> str:
    """Formats the capacity plan as lines `name  value  = formula` under the titles of sections."""
    sections, peak = capacity_plan(config, assumptions), assumptions.chip.flops / 1e12
    lines = [
        f"{config.name}, stage {config.stage}, on {assumptions.topology}: chips"
        f" {assumptions.chips}, hosts {assumptions.hosts}",
        f"assumed, not measured: MFU {assumptions.mfu:g} of {peak:g} TFLOP/s a chip;"
        f" {assumptions.bytes_per_vector:g} bytes a compressed vector",
    ]
    rows = [(n.replace("_", " "), readable(q)) for s in sections.values() for n, q in s.items()]
    name_width, value_width = (max(map(len, column)) for column in zip(*rows, strict=True))
    for title, section in sections.items():
        lines += ["", title]
        for name, quantity in section.items():
            label, value = name.replace("_", " "), readable(quantity)
            lines.append(f"  {label:<{name_width}}  {value:>{value_width}}  = {quantity.formula}")
    return "\n".join(lines)


def readable(quantity: Quantity) -> str:
    """Formats a value with three digits and a unit: `45.9 TiB`, `8.11 GiB/s`, `1.21 days`."""
    value, unit = quantity.value, quantity.unit
    if value is None:
        return "unknown"
    if unit == "yes/no":
        return "yes" if value else "no"
    if unit == "share":
        return f"{_digits(100 * value)} %"
    if unit == "cost":
        return f"{value:,.2f}"
    if unit.startswith("bytes"):
        names = [f"{prefix}iB{unit[5:]}" for prefix in "KMGTPE"]
        return _scaled(value, 1024, [unit, *names])
    if unit == "FLOP":
        return _scaled(value, 1000, [f"{prefix}FLOP" for prefix in ["", *"kMGTPEZY"]])
    if unit == "s":
        size, name = next((size, name) for size, name in _TIMES if value >= 2 * size or size < 60)
        return f"{_digits(value / size)} {name}"
    unit = "" if unit == "count" else f" {unit}"
    if value < 1e6:
        return _digits(value) + unit
    return _scaled(value / 1e6, 1000, [name + unit for name in _LARGE])


_TIMES = ((_DAY, "days"), (_HOUR, "hours"), (60.0, "min"), (1.0, "s"))
_LARGE = ("million", "billion", "trillion", "quadrillion")


def _scaled(value: float, step: int, names: list[str]) -> str:
    """Formats a value in the largest unit in which it is at least 1; every unit is `step` times the
    previous one."""
    power = 0
    while value >= step and power < len(names) - 1:
        value, power = value / step, power + 1
    return f"{_digits(value)} {names[power]}"


def _digits(value: float) -> str:
    """Formats three significant digits, or all integer digits from 1000 on: `0.494`, `13,388`."""
    if value == int(value):
        return f"{value:,.0f}"
    power = int(f"{value:.2e}".partition("e")[2])
    return f"{value:.2e}" if power < -3 else f"{value:,.{max(0, 2 - power)}f}"
