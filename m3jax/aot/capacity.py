"""Plans capacity: the needs of a config on a topology, by arithmetic alone.

`capacity_plan` turns a config and assumptions into sections of quantities, each with its unit and
its formula in words. Nothing here is measured: bytes and FLOP are counted from the config
(`m3jax.flops`), speeds are data-sheet figures (`m3jax.hardware`), utilisation is an assumption.

Every time below is `FLOP / (chips · peak FLOP/s · mfu)`. Bytes of a bank are those of memories with
all slots filled, without its checksums and manifest (about 30 bytes a memory).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from m3jax import flops
from m3jax.errors import ConfigError
from m3jax.hardware import Chip, chip_of_topology

_HOUR, _DAY = 3600.0, 86_400.0
_BFLOAT16 = 2  # bytes of a number in decoding
# Bytes that ScaNN 1.4.2 holds for one dimension of one embedding, beside the embeddings that it
# computes final scores from: codes of 4 bits for every two dimensions, or for every four in two
# clusters, kept one to a byte and once more packed. Its process grew by 0.69–0.80 for 60 000
# embeddings, with clusters and without.
_CODE_BYTES = 0.75
_MOST_REFERENCES = 1e15


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """Assumptions about the machine and its use.

    Attributes:
      topology: a TPU slice, `v5e:16x16`.
      references: size R of the knowledge base.
      bytes_per_vector: of one compressed key or value vector; the paper's quantizer stores 14.
      mfu: useful FLOP/s over peak, in training and writing. An assumption, never a measurement.
      chips_per_host: chips that share one host process; 4 on slices of several hosts, whatever TPU.
      host_bandwidth: bytes/s that a host can read from or write to the bank's storage; None takes
        the network of the data sheet, where there is one.
      price_per_chip_hour: of one chip, in any currency; None leaves costs out.
      decode_batch: rows decoded at once.
      decode_length: tokens of such a row, prompt included; None takes `data.sequence_length`.
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
        """Checks that numbers are in their range.

        Raises:
          ConfigError: names the flag, its value and the range.
        """
        whole = self.references == self.references // 1
        self._require(
            "references",
            whole and 1 <= self.references <= _MOST_REFERENCES,
            f"a whole number from 1 to {_MOST_REFERENCES:g}, for example 1.1e8",
        )
        self._require("mfu", 0 < self.mfu <= 1, "a share of the peak in (0, 1], for example 0.4")
        for name in ("bytes_per_vector", "host_bandwidth"):
            value = getattr(self, name)
            good = value is None or 0 < value < math.inf
            self._require(name, good, "a finite number of bytes above 0")
        price = self.price_per_chip_hour
        self._require(
            "price_per_chip_hour", price is None or 0 <= price < math.inf, "finite and at least 0"
        )
        for name in ("chips_per_host", "decode_batch", "decode_length"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "at least 1")

    def _require(self, name: str, good: bool, accepted: str) -> None:
        if not good:
            raise ConfigError(f"--{name}={getattr(self, name)}: must be {accepted}")


class Quantity(NamedTuple):
    """Figure of a plan.

    Attributes:
      value: in `unit`; None where it cannot be known.
      unit: `bytes`, `bytes/s`, `s`, `hours`, `FLOP`, `share` (of 1), `yes/no`, `cost` (in the
        currency of the price), `count` (of what the name says), or what is counted.
      formula: where the value comes from, in words.
    """

    value: float | int | bool | None
    unit: str
    formula: str


Section = dict[str, Quantity]


class Machine(NamedTuple):
    """Slice of `hosts` of at most `chips_per_host` chips each."""

    chip: Chip
    chips: int
    chips_per_host: int
    mfu: float
    host_bandwidth: float | None  # bytes/s; None where it is not known

    @property
    def hosts(self) -> int:
        """Hosts, the last of which may have fewer chips."""
        return -(-self.chips // self.chips_per_host)

    def seconds(self, work: float) -> float:
        """Seconds for `work` FLOP: work / (chips · peak FLOP/s · mfu)."""
        return work / (self.chips * self.chip.flops * self.mfu)

    def of_host(self, total: float) -> float:
        """Returns the part of `total` that belongs to the chips of one full host."""
        return total * self.chips_per_host / self.chips


def slice_of(assumptions: Assumptions) -> Machine:
    """Returns the slice of a topology; a host's network is `chips_per_host` shares of a chip.

    Raises:
      ConfigError: unknown topology; lists the chips.
    """
    chip, shape = chip_of_topology(assumptions.topology)
    chips = math.prod(shape)
    per_host = min(chips, assumptions.chips_per_host)
    bandwidth = assumptions.host_bandwidth or chip.network * per_host or None
    return Machine(chip, chips, per_host, assumptions.mfu, bandwidth)


def capacity_plan(config: ConfigDict, assumptions: Assumptions) -> dict[str, Section]:
    """Returns the sections of a plan by title.

    Args:
      config: a validated config.
      assumptions: of machine and use.

    Raises:
      ConfigError: unknown topology.
    """
    slice_ = slice_of(assumptions)
    return {
        "bank": bank(config, assumptions),
        "writing the bank": writing(config, assumptions, slice_),
        "training": training(config, assumptions, slice_),
        "reading memories in training": reading(config, assumptions, slice_),
        "index": index(config, assumptions),
        "decoding": decoding(config, assumptions, slice_),
        "cost model": cost_model(config),
    }


# -- sections --------------------------------------------------------------------------------------
def bank(config: ConfigDict, assumptions: Assumptions) -> Section:
    """Counts bytes of the bank and its files (Memory³, sparsity and storage).

    * of a memory: 2 (key, value) · layers · heads · tokens · bytes of a vector, `full` with all
      layers, query heads and reference tokens, the others with memory layers, key-value heads and
      kept tokens; a vector is head_dim numbers of `memory.dtype`, or `bytes_per_vector`;
    * of the bank: references · bytes of a memory;
    * files: references / `writer.shard_memories`, rounded up.
    """
    references, vector = assumptions.references, assumptions.bytes_per_vector
    shard = min(references, config.writer.shard_memories)
    raw, small = flops.memory_bytes(config), flops.memory_bytes(config, vector)
    full = flops.full_memory_bytes(config)
    raw_vector = raw / flops.memory_bytes(config, 1.0)
    files = math.ceil(references / config.writer.shard_memories)
    heads = "memory heads" if config.memory.heads else "memory layers · kv heads"
    kept = f"2 · {heads} · kept tokens ·"
    return {
        "references": Quantity(int(references), "count", "--references"),
        "memory_full": Quantity(
            full, "bytes", f"2 · layers · query heads · reference tokens · {raw_vector:g} bytes"
        ),
        "memory": Quantity(raw, "bytes", f"{kept} {raw_vector:g} bytes"),
        "memory_compressed": Quantity(small, "bytes", f"{kept} {vector:g} bytes"),
        "bank_full": Quantity(references * full, "bytes", "references · memory full"),
        "bank": Quantity(references * raw, "bytes", "references · memory"),
        "bank_compressed": Quantity(references * small, "bytes", "references · memory compressed"),
        "sparsity": Quantity(full / raw, "times", "bank full / bank"),
        "sparsity_compressed": Quantity(full / small, "times", "bank full / bank compressed"),
        "shard_files": Quantity(files, "count", "references / writer.shard_memories, rounded up"),
        "shard": Quantity(shard * raw, "bytes", "writer.shard_memories · memory"),
        "shard_compressed": Quantity(
            shard * small, "bytes", "writer.shard_memories · memory compressed"
        ),
    }


def writing(config: ConfigDict, assumptions: Assumptions, slice_: Machine) -> Section:
    """Estimates the time to write the bank, and the bandwidth of its storage.

    * seconds: FLOP of the writer over references of full length / (chips · peak · mfu);
    * bandwidth: bytes of the bank / seconds. Encoding with the quantizer is not counted.
    """
    references = int(assumptions.references)
    work = flops.writer(config, references)
    seconds = slice_.seconds(work)
    section = {
        "work": Quantity(work, "FLOP", "memory layers over every reference at full length"),
        "time": Quantity(seconds, "s", "work / (chips · peak · mfu)"),
        "speed": Quantity(references / seconds, "memories/s", "references / time"),
    }
    section |= _traffic("write", "bank{} / time", config, assumptions, slice_, references / seconds)
    return section | _cost(seconds, assumptions, slice_)


def training(config: ConfigDict, assumptions: Assumptions, slice_: Machine) -> Section:
    """Estimates speed, duration and cost of `train.steps` optimizer steps.

    * step time: useful FLOP of a step / (chips · peak · mfu);
    * tokens a day: `data.batch_size` · `data.sequence_length` / step time · 86 400 s;
    * duration: `train.steps` · step time, without evaluation, checkpoints and restarts;
    * cost: duration in hours · chips · price.
    """
    work, steps = flops.train_step(config), config.train.steps
    seconds = slice_.seconds(work)
    tokens = config.data.batch_size * config.data.sequence_length
    section = {
        "step_work": Quantity(work, "FLOP", "useful products, forward and backward"),
        "step_time": Quantity(seconds, "s", "step work / (chips · peak · mfu)"),
        "step_tokens": Quantity(tokens, "tokens", "data.batch_size · data.sequence_length"),
        "tokens_a_day": Quantity(
            tokens / seconds * _DAY, "tokens/day", "step tokens / step time · 86400"
        ),
        "steps": Quantity(steps, "count", "train.steps"),
        "tokens": Quantity(steps * tokens, "tokens", "steps · step tokens"),
        "time": Quantity(steps * seconds, "s", "steps · step time"),
    }
    return section | _cost(steps * seconds, assumptions, slice_)


def reading(config: ConfigDict, assumptions: Assumptions, slice_: Machine) -> Section:
    """Counts memories and bytes that hosts read from the bank while they train.

    * memories a step: `data.batch_size` · chunks of a row · `memory.per_chunk` where memories are
      precomputed, else none. Hidden chunks (`memory.dropout`) and repeated references count too, so
      that this is an upper bound;
    * bandwidth: memories a step · bytes of a memory / step time.
    """
    memories, words = 0, f"none are read with memory.source = {config.memory.source}"
    if config.memory.source == "precomputed":
        chunks = config.data.sequence_length // config.memory.chunk_length
        memories = config.data.batch_size * chunks * config.memory.per_chunk
        words = "data.batch_size · chunks of a row · memory.per_chunk"
    seconds = slice_.seconds(flops.train_step(config))
    formula = "memories a step · memory{} / step time"
    section = {"memories_a_step": Quantity(memories, "count", words)}
    return section | _traffic("read", formula, config, assumptions, slice_, memories / seconds)


def index(config: ConfigDict, assumptions: Assumptions) -> Section:
    """Counts host memory of the search index, of which a host holds the parts that it searches.

    * embeddings: references · `retrieval.dimension` · 4 bytes: all that the exact search needs;
    * ScaNN: references · dimension · (b + 0.75), b = 4 bytes for final scores from float32
      embeddings or 1 from int8. An estimate: 0.75 for its codes of 4 bits for four dimensions,
      one to a byte and once more packed, of both clusters that a reference is in. Without clusters
      codes are of two dimensions, once. The clusters add less than a hundredth on large sets.
    """
    numbers = assumptions.references * config.retrieval.dimension
    sizes = {"float32": 4, "int8": 1}
    section = {
        "embeddings": Quantity(
            numbers * 4, "bytes", "references · retrieval.dimension · 4: the exact search"
        )
    }
    for dtype, size in sizes.items():
        formula = f"references · retrieval.dimension · ({size} + {_CODE_BYTES}), an estimate"
        section[f"scann_{dtype}"] = Quantity(numbers * (size + _CODE_BYTES), "bytes", formula)
    return section


def decoding(config: ConfigDict, assumptions: Assumptions, slice_: Machine) -> Section:
    """Counts accelerator memory of decoding in bfloat16, without activations.

    * parameters: 2 bytes each, embedding and LM head included;
    * cache: 2 (key, value) · batch · length · layers · key-value heads · head dim · 2 bytes;
    * memories: batch · `memory.per_prompt_chunk` · memory layers · key-value heads · kept tokens ·
      head dim · 2 (key, value) · 2 bytes: those of the chunk being decoded;
    * per chip: all of it split evenly over the slice, or whole on one chip.
    """
    model, memory, batch = config.model, config.memory, assumptions.decode_batch
    length = assumptions.decode_length or config.data.sequence_length
    parameters = flops.parameters(config).total
    vector = model.kv_heads * model.head_dim * 2 * _BFLOAT16
    cache = batch * length * model.layers * vector
    memories = batch * memory.per_prompt_chunk * memory.layers * memory.kept_tokens * vector
    weights = parameters * _BFLOAT16
    total = weights + cache + memories
    available = slice_.chip.memory
    return {
        "parameters": Quantity(parameters, "count", "embedding and LM head included"),
        "weights": Quantity(weights, "bytes", "parameters · 2 (bfloat16)"),
        "cache": Quantity(
            cache, "bytes", f"{batch} rows · {length} tokens · layers · keys and values"
        ),
        "memories": Quantity(
            memories, "bytes", f"{batch} rows · memory.per_prompt_chunk · memory in bfloat16"
        ),
        "total": Quantity(total, "bytes", "weights + cache + memories"),
        "chip_memory": Quantity(available, "bytes", f"data sheet of {slice_.chip.name}"),
        "fits_one_chip": Quantity(total <= available, "yes/no", "total ≤ chip memory"),
        "sharded": Quantity(total / slice_.chips, "bytes", "total / chips"),
        "fits_sharded": Quantity(
            total / slice_.chips <= available, "yes/no", "sharded ≤ chip memory"
        ),
    }


def cost_model(config: ConfigDict) -> Section:
    """Computes the paper's shares and bounds for this shape (Memory³ §2 and appendix).

    * read share: FLOP of a row of four chunks to read all its memories, `memory.per_prompt_chunk`
      a chunk, over the FLOP of its layers without memories;
    * uses from: explicit write / (text read − explicit read); below it text in the context (RAG)
      is cheaper than explicit memory;
    * uses to: (implicit write − explicit write) / explicit read; above it parameters are.
    """
    low, high = flops.usage_interval(config)
    share = flops.prompt_read_share(config, 4 * config.memory.chunk_length)
    return {
        "read_share": Quantity(share, "share", "reading memories / layers of four prompt chunks"),
        "uses_from": Quantity(low, "uses", "explicit write / (text read − explicit read)"),
        "uses_to": Quantity(high, "uses", "(implicit write − explicit write) / explicit read"),
    }


def _traffic(
    verb: str,
    formula: str,
    config: ConfigDict,
    assumptions: Assumptions,
    slice_: Machine,
    memories: float,
) -> Section:
    """Bytes/s of `memories` a second, in total and on a full host, against the host's network."""
    available, name = slice_.host_bandwidth, slice_.chip.name
    source = f"chips of a host · data sheet of {name}"
    if assumptions.host_bandwidth:
        source = "--host_bandwidth"
    elif available is None:
        source = f"not known of {name}; give --host_bandwidth"
    section = {"host_network": Quantity(available, "bytes/s", source)}
    for which, vector in (("", None), (" compressed", assumptions.bytes_per_vector)):
        total = memories * flops.memory_bytes(config, vector)
        per_host = slice_.of_host(total)
        share = None if available is None else per_host / available
        share = 0.0 if per_host == 0 else share  # nothing to read suits any network
        figures = {
            verb: Quantity(total, "bytes/s", formula.format(which)),
            f"{verb}_per_host": Quantity(
                per_host, "bytes/s", f"{verb}{which} · chips of a host / chips"
            ),
            "network_share": Quantity(share, "share", f"{verb} per host{which} / host network"),
            "network_suffices": Quantity(
                None if share is None else share <= 1, "yes/no", "network share ≤ 1"
            ),
        }
        section |= {key + which.replace(" ", "_"): value for key, value in figures.items()}
    return section


def _cost(seconds: float, assumptions: Assumptions, slice_: Machine) -> Section:
    """Chip hours, and their cost where a price is given: hours · chips · price."""
    hours = seconds / _HOUR * slice_.chips
    section = {"chip_hours": Quantity(hours, "hours", "time · chips")}
    if assumptions.price_per_chip_hour is not None:
        cost = hours * assumptions.price_per_chip_hour
        section["cost"] = Quantity(cost, "cost", "chip hours · --price_per_chip_hour")
    return section


# -- showing ---------------------------------------------------------------------------------------
def capacity_report(config: ConfigDict, assumptions: Assumptions) -> dict[str, Any]:
    """Returns the plan as plain values for JSON: name, stage, assumptions, slice, quantities."""
    slice_ = slice_of(assumptions)
    return {
        "config": config.name,
        "stage": config.stage,
        "assumptions": dataclasses.asdict(assumptions),
        "slice": {"chip": slice_.chip.name, "chips": slice_.chips, "hosts": slice_.hosts},
        "quantities": {
            title: {name: quantity._asdict() for name, quantity in section.items()}
            for title, section in capacity_plan(config, assumptions).items()
        },
    }


def capacity_table(config: ConfigDict, assumptions: Assumptions) -> str:
    """Returns the plan as lines `name  value  formula` under the titles of its sections."""
    slice_, sections = slice_of(assumptions), capacity_plan(config, assumptions)
    lines = [
        f"{config.name}, stage {config.stage}, on {assumptions.topology}: chips {slice_.chips},"
        f" hosts {slice_.hosts}",
        f"assumed, not measured: MFU {assumptions.mfu:g} of {slice_.chip.flops / 1e12:g} TFLOP/s a"
        f" chip; {assumptions.bytes_per_vector:g} bytes a compressed vector",
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
    """Formats a value in the largest unit that it reaches; each is `step` times the unit before."""
    power = 0
    while value >= step and power < len(names) - 1:
        value, power = value / step, power + 1
    return f"{_digits(value)} {names[power]}"


def _digits(value: float) -> str:
    """Three digits below 1000, all before the point above: `0.494`, `45.9`, `13,388`."""
    if value == int(value):
        return f"{value:,.0f}"
    power = int(f"{value:.2e}".partition("e")[2])
    return f"{value:.2e}" if power < -3 else f"{value:,.{max(0, 2 - power)}f}"
