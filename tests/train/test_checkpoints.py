"""Parameters for other stages: restacked, or refused by name."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from train.tiny import FINGERPRINT, SyntheticPipeline, tiny_config

from m3jax.checkpoint import read_meta, restore_params, verify
from m3jax.errors import CheckpointError
from m3jax.make_model import make_model
from m3jax.mesh import make_mesh
from m3jax.train.checkpoints import Checkpoints, check_owner, claim
from m3jax.train.state import Program


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A stage folder with the checkpoints 3 and 4 of a model with memory layer 0 of 3."""
    config = tiny_config(model__layers=3, train__keep_last=2)
    folder = tmp_path_factory.mktemp("run") / "warmup"
    state = Program(config, make_mesh(config)).init()
    checkpoints = Checkpoints(folder, config, FINGERPRINT)
    for step in (2, 3, 4):
        checkpoints.save(state, step)
    checkpoints.close()
    return config, folder, jax.device_get(state.params)


def logits(config, params):
    tokens = SyntheticPipeline(config).batch(0).tokens
    return jax.jit(make_model(config, ()).logits)(params, tokens)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("first", "layers"),
    [
        (0, 1),
        (1, 1),
        pytest.param(1, 2, marks=pytest.mark.slow),
        pytest.param(0, 3, marks=pytest.mark.slow),
    ],
)
def test_layers_move_to_other_segments(saved, first, layers, sharded):
    config, folder, params = saved
    size = 4 if sharded else 1
    other = tiny_config(
        model__layers=3, memory__first_layer=first, memory__layers=layers, mesh__fsdp=size
    )
    mesh = make_mesh(other) if sharded else None
    restored, meta = restore_params(folder, make_model(other, ()), mesh=mesh)
    assert meta["step"] == 4 and meta["config"]["model"]["layers"] == 3
    assert restored["memory"]["query"].shape[0] == layers
    assert len(restored["embedding"].sharding.device_set) == size
    if not sharded:
        np.testing.assert_array_equal(logits(other, restored), logits(config, params))


def test_parameters_take_the_dtype_of_the_model(saved):
    _, folder, params = saved
    other = tiny_config(model__layers=3, model__param_dtype="bfloat16")
    restored, _ = restore_params(folder, make_model(other, ()))
    np.testing.assert_array_equal(
        np.asarray(restored["embedding"]), params["embedding"].astype("bfloat16")
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__mlp_width": 48}, r"memory/down is \(1, 32, 16\) there and \(1, 48, 16\) in"),
        ({"model__layers": 2}, r"upper/attention_norm is \(2, 16\) there and \(1, 16\) in"),
        ({"model__tied_embeddings": True}, r"parameter head is \(264, 16\) there and absent in"),
    ],
)
def test_checkpoint_of_another_shape_is_refused(saved, changes, message):
    _, folder, _ = saved
    other = tiny_config(**{"model__layers": 3, **changes})
    with pytest.raises(CheckpointError, match=message):
        restore_params(folder, make_model(other, ()))


def test_a_checkpoint_is_named_by_stage_or_step(saved):
    config, folder, _ = saved
    model = make_model(config, ())
    assert restore_params(folder, model, step=3)[1]["step"] == 3
    assert restore_params(folder / "checkpoints" / "3", model)[1]["step"] == 3
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 9 .* there are \[3, 4\]"):
        restore_params(folder, model, step=9)
    with pytest.raises(CheckpointError, match="no checkpoint in .*/nothing"):
        restore_params(folder / "nothing", model)


def test_meta_says_what_made_it(saved):
    config, folder, _ = saved
    meta = read_meta(folder / "checkpoints" / "4")
    assert meta["tokenizer"] == FINGERPRINT and meta["writer"] is None
    assert meta["name"] == "m3jax" and meta["config"]["seed"] == config.seed


def test_damaged_checkpoint_is_refused(saved, tmp_path):
    config, folder, _ = saved
    (tmp_path / "checkpoints" / "7" / "state").mkdir(parents=True)
    with (
        pytest.warns(UserWarning, match="checkpoints/7 is read unverified"),
        pytest.raises(CheckpointError, match="checkpoints/7 cannot be read"),
    ):
        restore_params(tmp_path, make_model(config, ()))


def test_kept_checkpoints(tmp_path):
    config = tiny_config(train__keep_last=1, train__keep_every=4)
    state = Program(config, make_mesh(config)).init()
    checkpoints = Checkpoints(tmp_path, config, FINGERPRINT)
    for step in (2, 4, 6, 8, 10):
        checkpoints.save(state, step)
    checkpoints.close()
    found = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert found == {4, 8, 10}
    config.train.update(keep_last=5, keep_every=0)
    checkpoints = Checkpoints(tmp_path, config, FINGERPRINT)
    checkpoints.save(state, 12)
    checkpoints.close()
    assert len(checkpoints.steps()) == 4
    config.train.keep_last = 2  # as if killed between a save and the deletion
    checkpoints = Checkpoints(tmp_path, config, FINGERPRINT)
    checkpoints.close()
    found = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert found == {10, 12}


def test_a_flipped_bit_of_any_file_is_refused(saved, tmp_path):
    config, folder, _ = saved
    copy = Path(shutil.copytree(folder, tmp_path / "warmup"))
    step, model = copy / "checkpoints" / "4", make_model(config, ())
    listed = json.loads((step / "checksums.json").read_text())["files"]
    there = [path for path in step.glob("*/**/*") if path.is_file()]
    assert {path.relative_to(step).as_posix() for path in there} == set(listed)
    for path in there:
        whole = path.read_bytes()
        path.write_bytes(bytes([*whole[:-1], whole[-1] ^ 4]))
        with pytest.raises(CheckpointError, match=rf"{path.name} is damaged .* that of step 3"):
            restore_params(copy, model)
        path.write_bytes(whole)
    restore_params(copy, model)
    (step / "checksums.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"checksums\.json is damaged; restore it from a copy"
    ):
        restore_params(copy, model)
    (step / "checksums.json").unlink()  # as an older version wrote it
    with pytest.warns(UserWarning, match=r"checkpoints/4 is read unverified"):
        restore_params(copy, model)


def test_exchanged_files_are_refused(saved, tmp_path):
    """Also those that end with their own CRC-32C, whose CRC-32C is therefore the same."""
    _, folder, _ = saved
    copy = Path(shutil.copytree(folder, tmp_path / "warmup")) / "checkpoints"
    for first in [path for path in (copy / "3").glob("*/**/*") if path.is_file()]:
        second = copy / "4" / first.relative_to(copy / "3")
        if second.is_file() and (whole := second.read_bytes()) != first.read_bytes():
            second.write_bytes(first.read_bytes())
            with pytest.raises(CheckpointError, match=rf"{second.name} (is damaged|has \d+ bytes)"):
                verify(copy / "4")
            second.write_bytes(whole)
    verify(copy / "4")


def test_processes_verify_a_share_each(saved, tmp_path):
    _, folder, _ = saved
    copy = Path(shutil.copytree(folder, tmp_path / "warmup")) / "checkpoints" / "4"
    path = next((copy / "state").rglob("d/*"))
    path.write_bytes(path.read_bytes() + b"x")
    refused = 0
    for process in range(3):
        try:
            verify(copy, share=(process, 3))
        except CheckpointError as error:
            refused += path.name in str(error)
    assert refused == 1


def test_without_its_config_a_stage_has_that_of_its_newest_checkpoint(saved, tmp_path):
    config, folder, _ = saved
    copy = Path(shutil.copytree(folder, tmp_path / "warmup"))
    check_owner(copy, config)
    with pytest.raises(CheckpointError, match=r"config\.model\.layers is 3 there and 2 here"):
        check_owner(copy, tiny_config(train__keep_last=2))
    claim(copy, config)
    path = copy / "config.json"
    path.write_text(path.read_text().replace('"layers": 3', '"layers": 2'))
    with pytest.raises(CheckpointError, match=r"config\.json is damaged; restore it .* or move it"):
        check_owner(copy, config)
