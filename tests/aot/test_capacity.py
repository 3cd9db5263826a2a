"""The capacity planner: the figures of the paper, figures computed by hand, and proportions."""

import json
import math
import runpy
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from m3jax.aot import capacity as plan
from m3jax.aot.capacity import Assumptions, Quantity
from m3jax.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
V5E_256 = 256 * 197e12 * 0.4  # FLOP/s of the slice at the assumed utilisation
WRITE_FLOP = 305_536_204_800  # of one reference of 128 tokens at the shape of Memory3-2B
STEP_FLOP = 7.348e16  # of a step with precomputed memories


def load(options: str = "stage=continual", name: str = "memory3") -> ConfigDict:
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](options)


def made(
    config: ConfigDict | None = None,
    topology: str = "v5e:16x16",
    references: float = 1.12e8,
    **other: float | None,
) -> dict[str, plan.Section]:
    return plan.capacity_plan(config or load(), Assumptions(topology, references, **other))


def values(title: str, sections: dict[str, plan.Section] | None = None) -> dict:
    section = (sections or made())[title]
    return {name: quantity.value for name, quantity in section.items()}


def lines(text: str) -> dict[tuple[str, str], str]:
    """(section, name) → the value as it is printed."""
    shown, title = {}, ""
    for line in text.splitlines():
        if "  = " in line:
            name, value = line.partition("  = ")[0].strip().split("  ", 1)
            shown[title, name] = value.strip()
        else:
            title = line
    return shown


def test_table_has_the_figures_of_the_paper() -> None:
    """The three totals agree on 1.12e8 references, which the paper rounds to 1.1e8."""
    shown = lines(plan.capacity_table(load(), Assumptions("v5e:16x16", 1.12e8)))
    assert shown["bank", "memory"] == "440 KiB"  # 450 560 bytes
    assert shown["bank", "bank full"] == "7.17 PiB"
    assert shown["bank", "bank"] == "45.9 TiB"
    assert shown["bank", "bank compressed"] == "4.02 TiB"
    assert shown["bank", "sparsity"] == "160 times"
    assert shown["bank", "sparsity compressed"] == "1,829 times"
    assert shown["cost model", "read share"] == "0.228 %"
    assert shown["cost model", "uses from"] == "0.494 uses"
    assert shown["cost model", "uses to"] == "13,388 uses"
    assert shown["training", "tokens"] == "120 billion tokens"
    assert shown["training", "step time"] == "3.64 s"


def test_table_is_aligned_and_says_what_is_assumed() -> None:
    text = plan.capacity_table(load(), Assumptions("v5e:16x16", 1.1e8, mfu=0.37))
    head = text.splitlines()[:2]
    assert head[0] == "memory3_2b, stage continual, on v5e:16x16: chips 256, hosts 64"
    assert head[1].startswith("assumed, not measured: MFU 0.37 of 197 TFLOP/s a chip; 14 bytes")
    assert len({line.index("  = ") for line in text.splitlines() if "  = " in line}) == 1


def test_files_of_the_bank() -> None:
    bank = values("bank", made(references=1001))
    assert bank["shard_files"] == 4  # 256 a file
    assert bank["shard"] == 256 * 450_560
    assert bank["shard_compressed"] == 256 * 2 * 22 * 8 * 8 * 14
    assert values("bank", made(references=10))["shard"] == 10 * 450_560


def test_writing_by_hand() -> None:
    writing = values("writing the bank")
    seconds = 1.12e8 * WRITE_FLOP / V5E_256
    assert writing["time"] == pytest.approx(seconds)
    assert writing["speed"] == pytest.approx(1.12e8 / seconds)
    assert writing["write"] == pytest.approx(1.12e8 * 450_560 / seconds)
    assert writing["write_per_host"] == pytest.approx(1.12e8 * 450_560 / seconds / 64)
    assert writing["write_compressed"] == pytest.approx(1.12e8 * 39_424 / seconds)
    assert writing["chip_hours"] == pytest.approx(seconds / 3600 * 256)


def test_training_by_hand() -> None:
    training = values("training", made(price_per_chip_hour=2.5))
    step = STEP_FLOP / V5E_256
    assert training["step_time"] == pytest.approx(step, rel=1e-3)
    assert training["step_tokens"] == 2048 * 2048
    assert training["tokens_a_day"] == pytest.approx(2048 * 2048 * 86_400 / step, rel=1e-3)
    assert training["time"] == pytest.approx(28_610 * step, rel=1e-3)
    assert training["cost"] == pytest.approx(28_610 * step / 3600 * 256 * 2.5, rel=1e-3)


def test_reading_by_hand() -> None:
    reading = values("reading memories in training")
    step = STEP_FLOP / V5E_256
    assert reading["memories_a_step"] == 2048 * 32
    assert reading["read"] == pytest.approx(65_536 * 450_560 / step, rel=1e-3)
    assert reading["read_per_host"] == pytest.approx(65_536 * 450_560 / step / 64, rel=1e-3)
    assert reading["read_per_host_compressed"] == pytest.approx(
        65_536 * 39_424 / step / 64, rel=1e-3
    )
    assert reading["host_network"] == 4 * 25e9 / 8
    share = reading["read_per_host"] / (4 * 25e9 / 8)
    assert reading["network_share"] == pytest.approx(share)
    assert reading["network_suffices"] is True
    assert not reading["bucket_suffices"] and reading["bucket_suffices_compressed"]


def test_network_that_suffices_only_with_compression() -> None:
    reading = values("reading memories in training", made(host_bandwidth=5e7))
    assert reading["host_network"] == 5e7
    assert reading["network_share"] > 1 > reading["network_share_compressed"] > 0
    assert (reading["network_suffices"], reading["network_suffices_compressed"]) == (False, True)


def test_unknown_network_is_said_and_not_judged() -> None:
    section = made(topology="v5p:4x4x8")["reading memories in training"]
    assert section["host_network"].value is None
    assert "--host_bandwidth" in section["host_network"].formula
    assert section["network_share"].value is section["network_suffices"].value is None
    assert plan.readable(section["network_suffices"]) == "unknown"
    known = values("reading memories in training", made(topology="v5p:4x4x8", host_bandwidth=1e9))
    assert known["network_suffices"] is True


@pytest.mark.parametrize("options", ["stage=warmup", "stage=continual,memories=online"])
@pytest.mark.parametrize("topology", ["v5e:16x16", "v4:4x4x4"])
def test_stages_that_do_not_read_the_bank(options: str, topology: str) -> None:
    config = load(options)
    sections = made(config, topology)
    reading = values("reading memories in training", sections)
    assert reading["memories_a_step"] == reading["read"] == reading["read_compressed"] == 0
    assert reading["network_share"] == 0 and reading["network_suffices"] is True
    assert (
        config.memory.source in sections["reading memories in training"]["memories_a_step"].formula
    )
    assert values("bank", sections) == values("bank")
    assert values("cost model", sections) == values("cost model")


def test_several_memories_of_a_chunk_are_all_read() -> None:
    config = load()
    config.memory.per_chunk = 3
    assert values("reading memories in training", made(config))["memories_a_step"] == 3 * 65_536


def test_index_by_hand() -> None:
    config = load()
    config.retrieval.dimension = 1024
    index = values("index", made(config, references=1e6))
    assert index["embeddings"] == 1e6 * 4096
    assert index["scann_float32"] == 1e6 * (4096 + 768)
    assert index["scann_int8"] == 1e6 * (1024 + 768)


def test_decoding_by_hand() -> None:
    decoding = values("decoding", made(decode_batch=4, decode_length=1000))
    parameters = 44 * (5 * 3200**2 + 2 * 3200 * 640 + 6400) + 3200 + 2 * 60_416 * 3200
    assert decoding["weights"] == 2 * parameters
    assert decoding["cache"] == 4 * 1000 * 44 * 2 * 640 * 2
    assert decoding["memories"] == 4 * 5 * 450_560
    assert decoding["total"] == decoding["weights"] + decoding["cache"] + decoding["memories"]
    assert decoding["sharded"] == decoding["total"] / 256
    assert decoding["fits_one_chip"] is decoding["fits_sharded"] is True
    longest = values("decoding", made(decode_batch=256))  # rows of data.sequence_length
    assert longest["cache"] == 256 * 2048 * 44 * 2 * 640 * 2
    assert (longest["fits_one_chip"], longest["fits_sharded"]) == (False, True)
    assert values("decoding", made(topology="v5e:1x1", decode_batch=256))["fits_sharded"] is False


def test_decoding_counts_bfloat16_whatever_the_dtype_of_the_bank() -> None:
    config = load()
    config.memory.dtype = "float32"
    assert values("decoding", made(config)) == values("decoding")
    assert values("bank", made(config))["memory"] == 2 * 450_560


def test_twice_the_chips_take_half_the_time() -> None:
    small, large = (
        made(price_per_chip_hour=1.0),
        made(topology="v5e:16x32", price_per_chip_hour=1.0),
    )
    for title in ("writing the bank", "training"):
        one, two = values(title, small), values(title, large)
        assert two["time"] == pytest.approx(one["time"] / 2)
        assert two["cost"] == pytest.approx(one["cost"])
    one, two = (values("reading memories in training", sections) for sections in (small, large))
    assert two["read"] == pytest.approx(2 * one["read"])
    assert two["read_per_host"] == pytest.approx(one["read_per_host"])


def test_utilisation_and_references_scale_as_they_should() -> None:
    slow, fast = made(mfu=0.2), made(mfu=0.4)
    assert values("training", slow)["time"] == pytest.approx(2 * values("training", fast)["time"])
    more = made(references=2.24e8)
    for title, name in (("bank", "bank"), ("writing the bank", "time"), ("index", "scann_int8")):
        assert values(title, more)[name] == pytest.approx(2 * values(title, fast)[name])
    assert values("training", more) == values("training", fast)


@pytest.mark.parametrize(("chips_per_host", "hosts"), [(1, 8), (3, 3), (8, 1), (100, 1)])
def test_a_full_host_reads_for_its_chips(chips_per_host: int, hosts: int) -> None:
    assumptions = Assumptions("v5e:2x4", 1e6, chips_per_host=chips_per_host)
    assert assumptions.hosts == hosts
    section = plan.capacity_plan(load(), assumptions)["reading memories in training"]
    chips = min(chips_per_host, 8)
    expected = section["read"].value * chips / 8
    assert section["read_per_host"].value == pytest.approx(expected)
    assert section["host_network"].value == chips * 25e9 / 8


def test_no_price_no_cost() -> None:
    sections = made()
    assert not [name for section in sections.values() for name in section if "cost" in name]
    assert values("training", made(price_per_chip_hour=0.0))["cost"] == 0


@pytest.mark.parametrize("name", ["quickstart", "wiki_small", "memory3", "ablation"])
def test_every_config_can_be_planned(name: str) -> None:
    shown = plan.capacity_table(
        load(name=name), Assumptions("v6e:2x2", 2000.0, price_per_chip_hour=1.0)
    )
    assert "nan" not in shown and "inf" not in shown


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"references": 0.0}, "--references=0.0: must be a whole number from 1"),
        ({"references": -5.0}, "--references=-5.0"),
        ({"references": 1.5}, "--references=1.5"),
        ({"references": math.nan}, "--references=nan"),
        ({"references": math.inf}, "--references=inf"),
        ({"references": 1e300}, r"--references=1e\+300"),
        ({"mfu": 0.0}, r"--mfu=0.0: must be a share of the peak in \(0, 1\]"),
        ({"mfu": 1.01}, "--mfu=1.01"),
        ({"mfu": math.nan}, "--mfu=nan"),
        ({"bytes_per_vector": 0.0}, "--bytes_per_vector=0.0"),
        ({"host_bandwidth": -1.0}, "--host_bandwidth=-1.0"),
        ({"price_per_chip_hour": -1.0}, "--price_per_chip_hour=-1.0"),
        ({"price_per_chip_hour": math.inf}, "--price_per_chip_hour=inf"),
        ({"chips_per_host": 0}, "--chips_per_host=0"),
        ({"decode_batch": 0}, "--decode_batch=0"),
        ({"decode_length": 0}, "--decode_length=0"),
        ({"topology": "h100:2x2"}, "chips: v4, v5e, v5p, v6e"),
    ],
)
def test_bad_input_is_refused_by_name(bad: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        made(**bad)


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (450_560, "bytes", "440 KiB"),
        (1023.9 * 2**40, "bytes/s", "1,024 TiB/s"),
        (3 * 2**70, "bytes", "3,072 EiB"),
        (0, "bytes/s", "0 bytes/s"),
        (9.996, "s", "10.0 s"),
        (119.0, "s", "119 s"),
        (120.0, "s", "2 min"),
        (7_199.0, "s", "120 min"),
        (7_201.0, "s", "2.00 hours"),
        (200_000.0, "s", "2.31 days"),
        (0.0004, "s", "4.00e-04 s"),
        (7.348e16, "FLOP", "73.5 PFLOP"),
        (0.00228, "share", "0.228 %"),
        (28_610, "count", "28,610"),
        (1.12e8, "count", "112 million"),
        (9.95e10, "tokens/day", "99.5 billion tokens/day"),
        (1234.5, "cost", "1,234.50"),
        (True, "yes/no", "yes"),
        (False, "yes/no", "no"),
        (None, "share", "unknown"),
    ],
)
def test_readable(value: float | None, unit: str, shown: str) -> None:
    assert plan.readable(Quantity(value, unit, "")) == shown


def test_report_is_json_with_every_quantity() -> None:
    assumptions = Assumptions("v5e:16x16", 1.12e8, price_per_chip_hour=3.0)
    report = json.loads(json.dumps(plan.capacity_report(load(), assumptions), allow_nan=False))
    assert report["config"] == "memory3_2b" and report["stage"] == "continual"
    assert report["assumptions"]["mfu"] == 0.4 and report["assumptions"]["references"] == 1.12e8
    assert report["slice"] == {"chip": "v5e", "chips": 256, "hosts": 64}
    for title, section in plan.capacity_plan(load(), assumptions).items():
        for name, quantity in section.items():
            assert report["quantities"][title][name] == quantity._asdict()
            assert quantity.formula and quantity.unit
