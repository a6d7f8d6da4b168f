"""Save and restore, and the sentences for directories that are no checkpoints."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ernie_jax import checkpoint
from ernie_jax.errors import UserError
from ernie_jax.sharding import make_layout, single


@pytest.fixture(scope="module")
def config_json(tiny_config) -> bytes:
    import dataclasses

    return json.dumps(dataclasses.asdict(tiny_config)).encode()


@pytest.fixture(scope="module")
def saved(tiny_model, config_json, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "checkpoint"
    checkpoint.save(directory, tiny_model, {"config.json": config_json}, source="a test")
    return directory


def leaves(model):
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model))}


def test_round_trip_is_exact(saved, tiny_model):
    restored = leaves(checkpoint.restore(saved, single()))
    for name, value in leaves(tiny_model).items():
        assert restored[name].dtype == value.dtype
        np.testing.assert_array_equal(restored[name], value, err_msg=name)


def test_written_on_one_mesh_read_on_any_other(saved, tiny_model, tiny_config, tmp_path):
    wishes = [(8, "expert"), (8, "tensor"), (4, "expert+data"), (8, "exchange"), (8, "fsdp"), (1, "single")]
    layouts = [make_layout(tiny_config, jax.devices()[:count], preset=preset) for count, preset in wishes]
    source = saved
    for number, layout in enumerate(layouts):
        model = checkpoint.restore(source, layout)
        placed = leaves(model)
        for name, value in leaves(tiny_model).items():
            np.testing.assert_array_equal(placed[name], value, err_msg=f"{layout.preset}: {name}")
        embed = placed["embed.weight"]
        assert embed.sharding.is_equivalent_to(layout.sharding(("vocab", "embed")), 2)
        source = tmp_path / str(number)
        checkpoint.save(source, model, {"config.json": (saved / "config.json").read_bytes()}, "a test")


def test_restore_in_groups(saved, tiny_model, monkeypatch):
    monkeypatch.setattr(checkpoint, "_GROUP_BYTES", 10_000)
    restored = leaves(checkpoint.restore(saved, single()))
    for name, value in leaves(tiny_model).items():
        np.testing.assert_array_equal(restored[name], value, err_msg=name)


def test_another_dtype_leaves_the_router_alone(saved, tiny_model):
    restored = leaves(checkpoint.restore(saved, single(), jnp.bfloat16))
    for name, value in leaves(tiny_model).items():
        expected = value if ".router." in name else value.astype(jnp.bfloat16)
        assert restored[name].dtype == expected.dtype
        np.testing.assert_array_equal(restored[name], expected, err_msg=name)


def test_save_refuses_a_directory_in_use(saved, tiny_model, config_json):
    with pytest.raises(UserError, match="not empty"):
        checkpoint.save(saved, tiny_model, {"config.json": config_json}, source="a test")


def broken(saved, tmp_path, change):
    manifest = json.loads((saved / "manifest.json").read_text())
    change(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    (tmp_path / "params").symlink_to(saved / "params")
    return tmp_path


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m.update(version=99), "format version 99 is not 1"),
        (lambda m: m.update(format="other"), "format is 'other'"),
        (lambda m: m["parameters"].pop("norm.weight"), "missing norm.weight"),
        (lambda m: m["parameters"].update(extra={"shape": [1]}), "unexpected extra"),
        (lambda m: m["parameters"]["norm.weight"].update(shape=[3]), r"norm.weight is \(3,\), expected \(64,\)"),
    ],
)
def test_checkpoints_that_do_not_fit(saved, tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        checkpoint.restore(broken(saved, tmp_path, change), single())


def test_missing_files(saved, tmp_path, monkeypatch):
    """Fewer files than were written: named before anything is loaded, where zeros would be read."""
    shutil.copytree(saved, tmp_path / "some")
    state = tmp_path / "some" / "params" / "state"
    (state / "layers.1.mlp.experts.down.weight" / "0.0.0").unlink()
    monkeypatch.setattr(checkpoint.ocp, "load", None)
    sentence = r"some: parameter layers.1.mlp.experts.down.weight lacks 1 of its files \(0.0.0\); copy"
    with pytest.raises(UserError, match=sentence):
        checkpoint.restore(tmp_path / "some", single())
    shutil.rmtree(state / "embed.weight")
    with pytest.raises(UserError, match=r"embed.weight lacks 1 of its files \(.zarray\) and 1 more parameters"):
        checkpoint.restore(tmp_path / "some", single())


def test_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        checkpoint.restore(tmp_path / "nothing", single())
    with pytest.raises(UserError, match="run `main.py convert` first"):
        checkpoint.restore(tmp_path, single())
    (tmp_path / "params").mkdir()
    with pytest.raises(UserError, match="run the same convert command again"):
        checkpoint.restore(tmp_path, single())


def test_a_parameter_may_be_larger_than_what_is_read_at_once(saved, tiny_model, monkeypatch):
    """Orbax refuses arrays beyond its limit; the 21B's expert stacks in float32 have 2 GB."""
    monkeypatch.setattr(checkpoint, "_READ_BYTES", 1000)
    restored = leaves(checkpoint.restore(saved, single()))
    np.testing.assert_array_equal(restored["embed.weight"], tiny_model.embed.weight[...])
