"""Every shipped config, with every value of its options, builds and validates."""

import runpy
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

import m3jax.config
from m3jax import flops
from m3jax.config import PREFIX_TOKENS
from m3jax.errors import ConfigError
from m3jax.make_model import make_model

FOLDER = Path(__file__).parent.parent / "configs"
FILES = {path.stem: runpy.run_path(str(path)) for path in sorted(FOLDER.glob("*.py"))}
ABLATION = FILES["ablation"]
PAPER = {"2b": "2.433e+09", "0p9b": "9.23e+08"}


def build(name: str, **options: Any) -> ConfigDict:
    config = FILES[name]["get_config"](",".join(f"{o}={value}" for o, value in options.items()))
    return m3jax.config.validate(config)


def each_option() -> list[tuple[str, dict[str, Any]]]:
    """Each value of each option on its own, in every stage."""
    cases: list[tuple[str, dict[str, Any]]] = []
    for name, file in FILES.items():
        for option, values in file["OPTIONS"].items():
            for value in values:
                for stage in file["OPTIONS"]["stage"]:
                    case = (name, {"stage": stage, option: value})
                    if option not in ("stage", "shape"):  # shapes have a test of their own
                        cases.append(case)
    return cases


def test_all_configs_are_here() -> None:
    assert {"ablation", *(file for file, _ in ABLATION["BASES"].values())} <= FILES.keys()


@pytest.mark.parametrize(("name", "options"), each_option())
def test_every_option_builds(name: str, options: dict[str, Any]) -> None:
    if name == "ablation":
        options = {"base": "wiki_small", **options}
    config = build(name, **options)
    assert config.stage == options["stage"]
    assert (config.memory.source == "none") == (config.stage == "warmup")


@pytest.mark.parametrize("name", FILES)
def test_default_is_the_first_value_of_every_option(name: str) -> None:
    first = {option: values[0] for option, values in FILES[name]["OPTIONS"].items()}
    assert build(name).to_dict() == build(name, **first).to_dict()


@pytest.mark.parametrize("name", FILES)
def test_unknown_option_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match="'stage=finetune' is unknown or ambiguous; accepted: "):
        FILES[name]["get_config"]("stage=finetune")


@pytest.mark.parametrize("name", FILES)
def test_documentation_names_every_option(name: str) -> None:
    text = FILES[name]["__doc__"]
    assert f"configs/{name}.py" in text
    assert all(option in text for option in FILES[name]["OPTIONS"])


def test_config_file_flag_takes_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the command line: the text after the colon, then overrides of single fields."""
    file = f"--config={FOLDER}/memory3.py:stage=continual,memories=online"
    command = ["train.py", file, "--config.train.steps=700"]
    monkeypatch.setattr("sys.argv", command)  # where overrides are looked up
    flag_values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=flag_values)
    flag_values(command)
    assert flag_values.config.memory.source == "online"
    assert flag_values.config.train.steps == 700


# -- what the files say ----------------------------------------------------------------------------
@pytest.mark.parametrize(("shape", "non_embedding"), PAPER.items())
def test_parameters_of_the_real_model(shape: str, non_embedding: str) -> None:
    """Counted from the abstract shapes of the model: the paper's number, and equal to `flops`."""
    config = build("memory3", shape=shape)
    leaves = jax.tree_util.tree_leaves_with_path(make_model(config, PREFIX_TOKENS).abstract()[0])
    tables = other = 0
    for path, leaf in leaves:
        keys = jax.tree_util.keystr(path)
        if "embedding" in keys or "head" in keys:
            assert leaf.shape == (config.model.vocabulary, config.model.hidden)
            tables += int(np.prod(leaf.shape))
        else:
            other += int(np.prod(leaf.shape))
    assert f"{other:.{len(non_embedding) - 6}e}" == non_embedding
    assert flops.parameters(config) == (other, other + tables)


@pytest.mark.parametrize("shape", PAPER)
def test_settings_of_the_paper(shape: str) -> None:
    config = build("memory3", shape=shape, stage="continual")
    memory, model = config.memory, config.model
    assert (memory.first_layer, memory.layers) == (0, model.layers // 2)
    assert model.hidden == model.mlp_width == model.query_heads * model.head_dim
    assert (memory.reference_length, memory.kept_tokens, memory.chunk_length) == (128, 8, 64)
    assert (memory.per_chunk, memory.window, memory.per_prompt_chunk) == (1, 5, 5)
    assert config.data.sequence_length * config.data.batch_size == 2**22  # about 4M tokens a step
    assert (model.param_dtype, model.compute_dtype) == ("bfloat16", "bfloat16")
    assert (config.optimizer.schedule, config.optimizer.weight_decay) == ("wsd", 0.1)
    assert (config.retrieval.overlap_train, config.retrieval.shift) == (0.9, 0)


@pytest.mark.parametrize("shape", PAPER)
def test_settings_of_the_paper_after_pretraining(shape: str) -> None:
    """SFT: 5e-5, 10 % rise, decay 0.1, batch 512 of 2048, 3 epochs, 8 rounds; DPO: 4e-6, 0.01."""
    sft, dpo = (build("memory3", shape=shape, stage=stage) for stage in ("sft", "dpo"))
    for config, peak in ((sft, 5e-5), (dpo, 4e-6)):
        assert (config.optimizer.schedule, config.optimizer.learning_rate) == ("cosine", peak)
        assert (config.data.batch_size, config.data.sequence_length) == (512, 2048)
        assert (config.optimizer.lr_warmup_share, config.optimizer.weight_decay) == (0.1, 0.1)
    assert (sft.train.epochs, sft.chat.most_rounds, dpo.preference.beta) == (3, 8, 0.01)
    resolved = m3jax.config.with_epochs(sft, rows=51_200)
    assert (resolved.train.steps, resolved.optimizer.lr_warmup_steps) == (300, 30)
    warmup = build("memory3", shape=shape)
    assert m3jax.config.with_epochs(warmup, rows=5).to_dict() == warmup.to_dict()


def test_wiki_small_is_small_and_shares_its_embedding() -> None:
    config = build("wiki_small", stage="continual", memories="online", shift=1)
    assert 1e7 < flops.parameters(config).total < 3e7
    assert config.model.tied_embeddings
    assert config.retrieval.shift == 1
    assert config.memory.source == "online"
    assert build("wiki_small").train.steps > config.train.steps


# -- ablations -------------------------------------------------------------------------------------
def test_ablation_without_options_is_the_base() -> None:
    ablation, base = build("ablation", base="memory3_0p9b"), build("memory3", shape="0p9b")
    assert ablation.to_dict() == base.to_dict()


@pytest.mark.parametrize("base", ABLATION["OPTIONS"]["base"])
def test_ablation_reads_distractors_in_place_of_earlier_chunks(base: str) -> None:
    plain = build("ablation", base=base, stage="continual")
    varied = build("ablation", base=base, stage="continual", distractors=4)
    memory = varied.memory
    assert varied.name == f"{base}-distractors-4"
    assert (memory.per_chunk, memory.distractors, memory.window) == (5, 4, 1)
    varied.name = plain.name
    for field in ("per_chunk", "distractors", "window"):
        memory[field] = plain.memory[field]
    assert varied.to_dict() == plain.to_dict()
    warmup = build("ablation", base=base, stage="warmup", distractors=4)
    assert warmup.to_dict() == build("ablation", base=base, stage="warmup").to_dict()


@pytest.mark.parametrize("base", ABLATION["OPTIONS"]["base"])
def test_ablation_changes_only_what_it_says(base: str) -> None:
    plain = build("ablation", base=base, stage="continual")
    varied = build(
        "ablation",
        **{"base": base, "stage": "continual", "memories": "online", "shift": 1},
        **{"layers": "middle", "kept": 4, "weight": "approximate"},
    )
    assert varied.name == f"{base}-memories-online-layers-middle-kept-4-weight-approximate-shift-1"
    memory = varied.memory
    above = varied.model.layers - memory.first_layer - memory.layers
    assert memory.first_layer in (above - 1, above, above + 1)
    assert (memory.source, memory.kept_tokens, memory.selection) == ("online", 4, "approximate")
    assert varied.retrieval.shift == 1
    varied.name = plain.name
    varied.retrieval.shift = plain.retrieval.shift
    for field in ("source", "first_layer", "kept_tokens", "selection"):
        varied.memory[field] = plain.memory[field]
    assert varied.to_dict() == plain.to_dict()


def test_ablation_of_what_keeps_training_stable() -> None:
    chosen = {"init": -0.6, "decay": 0.4, "z_loss": 0.0001, "qk_norm": True}
    config = build("ablation", base="memory3_2b", **chosen)
    assert (config.model.init_exponent, config.optimizer.weight_decay) == (-0.6, 0.4)
    assert (config.train.z_loss, config.model.qk_norm) == (1e-4, True)
    assert config.name == "memory3_2b-init--0.6-decay-0.4-z_loss-0.0001-qk_norm-True"


def test_ablation_of_warmup_has_no_memories() -> None:
    config = build("ablation", base="wiki_small", memories="online")
    assert (config.memory.source, config.name) == ("none", "wiki_small")


@pytest.mark.parametrize("kept", [4, 8, 16])
@pytest.mark.parametrize("base", ABLATION["OPTIONS"]["base"])
def test_ablation_of_kept_tokens(base: str, kept: int) -> None:
    longest = build("ablation", base=base).memory.reference_length
    if kept <= longest:
        assert build("ablation", base=base, kept=kept).memory.kept_tokens == kept
    else:
        with pytest.raises(ConfigError, match=f"memory.reference_length = {longest}"):
            build("ablation", base=base, kept=kept)


@pytest.mark.parametrize("shape", ABLATION["SHAPES"])
def test_shapes_keep_their_size(shape: str) -> None:
    config = build("ablation", base="memory3_2b", shape=shape, stage="continual")
    assert 2.1e9 < flops.parameters(config).non_embedding < 2.4e9
    model = config.model
    assert shape == f"{model.layers}x{model.query_heads}x{model.head_dim}"
    assert model.hidden == model.mlp_width == model.query_heads * model.head_dim
    assert config.memory.layers == model.layers // 2


def test_shapes_are_of_one_base() -> None:
    with pytest.raises(ConfigError, match="shape=64x32x80.*base=memory3_2b, not of base=wiki"):
        build("ablation", base="wiki_small", shape="64x32x80")
