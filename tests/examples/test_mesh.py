"""The trainer on meshes of CPU devices: the same losses wherever its arrays lie."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

import lowrank_optax as lro
from examples.llama import config as configs
from examples.llama import optimizers
from examples.llama.batches import as_batch
from examples.llama.checkpoint import Checkpoints, Store, on_device
from examples.llama.config import TrainConfig, UsageError, resolve
from examples.llama.model import abstract_model
from examples.llama.placement import (
    Placement,
    check_rows,
    choose_placement,
    fresh_state,
    make_mesh,
    parse_mesh,
    whole_axes,
)
from examples.llama.presets import Preset
from examples.llama.step import make_steps, split_rows
from examples.llama.train import Trainer

STEPS = 5
# Sums over rows and columns are added in another order, and Adam divides by their
# roots: relative errors of 1e-7 a sum, of losses near 5, after a few steps.
TOLERANCE = 1e-5


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("fsdp=-1", (1, 8, 1)),
        ("data=2,fsdp=4", (2, 4, 1)),
        ("data=2, tensor=2,fsdp=-1", (2, 2, 2)),
    ],
)
def test_parse_mesh(text, sizes):
    assert tuple(parse_mesh(text, 8).values()) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model=2", "takes sizes of data, fsdp, tensor.* got 'model=2'"),
        ("fsdp=0", "got 'fsdp=0'"),
        ("fsdp=-1,data=-1", "may leave one axis open .* not data and fsdp"),
        ("data=3", "names 3 devices, and there are 8; for example data=1,fsdp=8"),
        ("data=3,fsdp=-1", "names 3 devices or a multiple, and there are 8"),
        ("data=2,fsdp=2,tensor=4", "for example data=2,fsdp=1,tensor=4"),
    ],
)
def test_a_mesh_that_does_not_fit(text, message):
    with pytest.raises(UsageError, match=message):
        parse_mesh(text, 8)


def test_rows_that_cannot_be_cut():
    mesh = make_mesh(parse_mesh("data=2,fsdp=4", 8))
    check_rows(mesh, 16)
    with pytest.raises(UsageError, match=r"12 rows .* = 8 devices; .* gives 16 rows"):
        check_rows(mesh, 12)


def preset(monkeypatch, ff_width=48):
    tiny = configs.PRESETS["tiny"]
    model = dataclasses.replace(
        tiny.model, width=64, ff_width=ff_width, layers=2, heads=2
    )
    recipe = dataclasses.replace(
        tiny.recipe,
        steps=8,
        rank=8,
        update_proj_gap=3,
        seq_len=16,
        batch_size=8,
        eval_tokens=300,
        eval_batch_size=6,
    )
    monkeypatch.setitem(configs.PRESETS, "micro", Preset(model, recipe))


def test_what_is_used_when_nothing_is_said(monkeypatch, capsys):
    preset(monkeypatch)
    config, _ = resolve(TrainConfig(preset="micro"))
    assert choose_placement(config).name == "data=1,fsdp=8,tensor=1"
    assert choose_placement(config, jax.devices()[:1]) == Placement(
        None, jax.devices()[0]
    )
    assert not capsys.readouterr().out
    config = dataclasses.replace(config, batch_size=4)
    assert choose_placement(config).mesh is None
    assert "one of 8 devices is used: 4 rows" in capsys.readouterr().out


@pytest.fixture(scope="module")
def batches():
    """Rows of varied text: no gradient is zero but for its rounding."""
    rng = np.random.default_rng(0)
    rows = [
        [rng.integers(0, 264, n).tolist() for n in rng.integers(3, 18, 8)]
        for _ in range(2)
    ]
    both = [split_rows(as_batch(r, 8, 16), 1) for r in rows]
    return [both[step % 2] for step in range(STEPS)]


def build(optimizer: str, mesh: str, devices: int, weights: str = "plain"):
    """Config, placement and all that a step needs."""
    flags = {"rank": 8, "warmup": 1, "lr": 0.01, "mesh": mesh}
    config, model = resolve(
        TrainConfig(preset="micro", optimizer=optimizer, weights=weights, **flags)
    )
    placement = choose_placement(config, jax.devices()[:devices])
    tx = optimizers.guarded(config, optimizers.build_optimizer(config))
    definition, params = abstract_model(model)
    codec = lro.weight_storage(weights, config.param_dtype, layer_axis=0)
    layout = placement.layout(params, tx, codec)
    on_mesh = layout if placement.mesh else None
    steps = make_steps(definition, tx, codec, layout=on_mesh)
    return placement, layout, steps, fresh_state(layout, model, 0, tx, codec)


def losses(batches, *args, **options):
    placement, layout, steps, (params, state) = build(*args, **options)
    found = []
    for number, batch in enumerate(batches):
        key = jax.random.key(number)
        batch = placement.batch(batch)
        params, state, metrics = steps.train(params, state, batch, key)
        found.append(float(metrics["loss"]))
    places = jax.tree.map(lambda x: x.sharding, (params, state))
    same = jax.tree.map(
        lambda a, b, x: a.is_equivalent_to(b, x.ndim),
        places,
        (layout.stored, layout.state),
        (params, state),
    )
    assert all(jax.tree.leaves(same))
    return found


LAYOUTS = {
    "fsdp": ("fsdp=2", 2),
    "tensor": ("tensor=4", 4),
    "all": ("data=2,fsdp=2,tensor=2", 8),
}


def check_layouts(monkeypatch, batches, optimizer, layouts, ff_width=48):
    preset(monkeypatch, ff_width)
    expected = losses(batches, optimizer, "", 1)
    assert expected[-1] < expected[0]
    for mesh, devices in layouts:
        found = losses(batches, optimizer, mesh, devices)
        np.testing.assert_allclose(found, expected, rtol=TOLERANCE, err_msg=mesh)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("optimizer", "layout"), [("adamw", ("fsdp=4", 4)), ("galore", LAYOUTS["all"])]
)
def test_losses_agree(monkeypatch, batches, optimizer, layout):
    check_layouts(monkeypatch, batches, optimizer, [layout])


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer", ["adamw", "galore", "subtrack", "gwt", "galore_8bit"]
)
def test_losses_agree_everywhere(monkeypatch, batches, optimizer):
    layouts = [*LAYOUTS.values(), ("fsdp=4", 4), ("data=8", 8)]
    check_layouts(monkeypatch, batches, optimizer, layouts)


def test_an_axis_that_does_not_divide_stays_whole(monkeypatch):
    preset(monkeypatch, ff_width=51)
    config, model = resolve(TrainConfig(preset="micro", mesh="fsdp=2,tensor=4"))
    mesh = choose_placement(config).mesh
    assert mesh is not None
    lines = whole_axes(mesh, abstract_model(model)[1])
    assert len(lines) == 3
    assert lines[0] == (
        "layers/mlp/down/kernel (2, 51, 64): ff_width stays whole, tensor=4 does not "
        "divide 51"
    )


def test_heads_that_are_cut_are_named(monkeypatch, capsys):
    preset(monkeypatch)
    for mesh, said in [
        ("fsdp=4,tensor=2", ""),
        ("fsdp=2,tensor=4", "tensor=4 does not divide 2 heads: every layer's "),
    ]:
        config, _ = resolve(TrainConfig(preset="micro", mesh=mesh))
        choose_placement(config)
        out = capsys.readouterr().out
        assert out.startswith(said) and bool(out) == bool(said)
    assert "tensor=2 keeps them whole" in out


@pytest.mark.slow
def test_losses_agree_with_an_odd_width(monkeypatch, batches):
    layouts = [("fsdp=2,tensor=2", 4), ("tensor=4", 4)]
    check_layouts(monkeypatch, batches, "galore", layouts, ff_width=51)


def sides(mesh, devices, **flags):
    flags = {"preset": "micro", "optimizer": "galore", "mesh": mesh} | flags
    config, model = resolve(TrainConfig(**flags))
    placement = choose_placement(config, jax.devices()[:devices])
    params = abstract_model(model)[1]
    places = placement.params(params) if placement.mesh else None
    found = optimizers.sides(optimizers.build_optimizer(config, places), params)
    return {path.split("/")[-2]: side for path, side in found.items()}


@pytest.mark.whole
def test_sides(monkeypatch):
    preset(monkeypatch, ff_width=96)
    short = {"q": "left", "k": "left", "v": "left", "o": "left"}
    short |= {"gate": "left", "up": "left", "down": "right"}
    assert sides("", 1) == sides("", 1, side="auto") == short
    assert sides("", 1, side="long")["gate"] == "right"
    # Each basis lies on the axis that the mesh leaves whole.
    cut_in = {name: "right" for name in ("q", "k", "v", "gate", "up")}
    assert sides("fsdp=2", 2, side="auto") == cut_in | {"o": "left", "down": "left"}
    cut_out = {name: "left" for name in cut_in} | {"o": "right", "down": "right"}
    assert sides("tensor=2", 2, side="auto") == cut_out
    for name in optimizers.OPTIMIZERS:
        if name not in configs.NO_SIDE:
            found = sides("", 1, optimizer=name, side="right")
            assert set(found.values()) <= {"right"}, name
    with pytest.raises(UsageError, match="--side: gwt projects on no side"):
        sides("", 1, optimizer="gwt", side="long")
    with pytest.raises(UsageError, match="--side must be one of short, long, left"):
        sides("", 1, side="top")


@pytest.mark.whole
def test_a_checkpoint_is_restored_on_another_mesh(monkeypatch, tmp_path):
    preset(monkeypatch)
    args = "galore", "data=2,fsdp=2,tensor=2", 8, "int8"
    _, layout, _, saved = build(*args)
    checkpoints = Checkpoints(Store(tmp_path), 1)
    checkpoints.save(1, saved, {})
    checkpoints.wait()
    assert checkpoints.last_saved == 1
    for mesh, devices in [("fsdp=4", 4), ("", 1)]:
        _, layout, _, _ = build("galore", mesh, devices, "int8")
        places = layout.stored, layout.state
        shapes = on_device(jax.eval_shape(lambda: saved), places)
        found = checkpoints.restore(1, shapes)
        jax.tree.map(np.testing.assert_array_equal, found, saved)
        same = jax.tree.map(lambda x, s: x.sharding == s, found, places)
        assert all(jax.tree.leaves(same))
    checkpoints.close()


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["plain", "int8"])
def test_a_run_goes_on_with_fewer_devices(monkeypatch, tmp_path, capsys, weights):
    preset(monkeypatch)
    text = tmp_path / "text.txt"
    text.write_text("a basis of few columns, and a gradient of few directions\n" * 99)

    def run(name, mesh, devices, **flags):
        flags |= {"data": str(text), "val_data": str(text), "warmup": 1}
        config = TrainConfig(
            preset="micro", weights=weights, mesh=mesh, run_dir=str(name), **flags
        )
        trainer = Trainer(config, jax.devices()[:devices])
        result = trainer.run(lambda: False)
        trainer.close()
        assert result is not None
        found = [line["loss"] for line in trainer.metrics.lines if "loss" in line]
        return [*found, result.loss]

    first = tmp_path / "first"
    run(first, "data=2,fsdp=2,tensor=2", 8, stop_step=4)
    copies = [shutil.copytree(first, tmp_path / name) for name in ("four", "one")]
    expected = run(first, "data=2,fsdp=2,tensor=2", 8, resume=True)
    assert len(expected) == 9
    for copy, mesh, devices in zip(copies, ("fsdp=4", ""), (4, 1), strict=True):
        capsys.readouterr()
        found = run(copy, mesh, devices, resume=True)
        assert "mesh: data=2,fsdp=2,tensor=2, now" in capsys.readouterr().out
        np.testing.assert_allclose(found, expected, rtol=TOLERANCE)
