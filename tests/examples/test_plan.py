"""`python -m examples.llama.plan`: bytes from shapes, and what is said of them."""

import dataclasses
import re

import jax
import pytest

import lowrank_optax as lro
from examples.llama import optimizers, plan
from examples.llama.config import TrainConfig, UsageError, resolve
from examples.llama.estimate import (
    abstract_mesh,
    estimate,
    parse_topology,
    state_bytes,
)
from examples.llama.mesh import make_mesh, param_shardings
from examples.llama.model import abstract_model, init_params

FEW = ("adamw", "galore", "subtrack", "gwt", "galore_8bit")
MESHES = ({"data": 1, "fsdp": 8, "tensor": 1}, {"data": 2, "fsdp": 2, "tensor": 2})


@pytest.mark.parametrize(
    ("text", "profile", "devices", "gib"),
    [
        ("v5e:16x16", "v5e", 256, 16),
        ("v4:2x2x4", "v4", 16, 32),  # the two cores of a chip are one device
        ("v6e:4x4", "v6e", 16, 32),
        ("v5p:2x2x2", "v5p", 8, 95),
    ],
)
def test_topologies(text, profile, devices, gib):
    found = parse_topology(text)
    assert (found.profile, found.devices) == (profile, devices)
    assert found.memory_bytes == gib * 2**30


def test_gpus_are_a_number():
    found = parse_topology("h100:8")
    assert (found.devices, found.memory_bytes) == (8, 80 * 10**9)


@pytest.mark.parametrize("text", ["v9:2x2", "v5e", "v5e:3x2", "h100:2x2", "v4:axb"])
def test_unknown_topologies_name_the_known(text):
    with pytest.raises(UsageError, match="expected v5e or v6e with an extent"):
        parse_topology(text)


def config_of(optimizer, **flags):
    flags = {"rank": 8, "batch_size": 16, "seq_len": 16, **flags}
    return resolve(TrainConfig(preset="tiny", optimizer=optimizer, **flags))


def check_bytes(optimizer, sizes):
    """Against the bytes of a state that is really there."""
    config, model = config_of(optimizer)
    model = dataclasses.replace(model, width=64, ff_width=88, layers=2)
    mesh, (_, shapes) = make_mesh(sizes), abstract_model(model)
    shardings = param_shardings(mesh, shapes)
    tx = optimizers.guarded(config, optimizers.build_optimizer(config))
    expected = estimate(config, model, tx, sizes, "v5e")
    whole = init_params(model, 0)
    params = jax.device_put(whole, shardings)
    state = jax.device_put(tx.init(whole), lro.state_shardings(tx, params, shardings))

    def on_first(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    assert expected.parameters == on_first(params)
    assert expected.state == on_first(state) == state_bytes(tx, shapes, shardings)


@pytest.mark.parametrize("sizes", MESHES, ids=["fsdp", "all"])
@pytest.mark.parametrize("optimizer", FEW)
def test_state_and_parameters_are_exact(optimizer, sizes):
    check_bytes(optimizer, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", sorted({*optimizers.OPTIMIZERS} - {*FEW}))
def test_state_and_parameters_are_exact_for_every_optimizer(optimizer):
    check_bytes(optimizer, MESHES[1])


def test_a_state_of_low_rank_is_cut_over_all_devices():
    """At 7B on 16 devices, the layers' matrices, rank 1024: bases are cut as well."""
    sizes = {"data": 1, "fsdp": 16, "tensor": 1}

    def layers(optimizer, devices, rank=1024):
        config, model = resolve(
            TrainConfig(preset="7b", optimizer=optimizer, param_dtype="bfloat16")
            if rank is None
            else TrainConfig(
                preset="7b", optimizer=optimizer, rank=rank, param_dtype="bfloat16"
            )
        )
        _, params = abstract_model(model)
        kernels = {"layers": {name: params["layers"][name] for name in ("attn", "mlp")}}
        mesh = abstract_mesh(sizes | {"fsdp": devices})
        tx = optimizers.build_optimizer(config)
        return state_bytes(tx, kernels, param_shardings(mesh, kernels))

    for optimizer in ("galore", "subtrack", "galore_8bit"):
        whole, part = layers(optimizer, 1), layers(optimizer, 16)
        # Counters and the like are everywhere; a kilobyte against hundreds of MiB.
        assert part <= whole / 16 * 1.001 + 4096
    assert layers("galore", 16) < layers("adamw", 16)


def run(capsys, *flags):
    code = plan.main(["--preset", "130m", "--batch", "16", "--seq", "256", *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.usefixtures("quick_table")
def test_a_plan_that_fits(capsys):
    code, out, _ = run(capsys, "--topology", "v5e:2x2", "--optimizer", "subtrack")
    assert code == 0
    assert "4 devices of v5e:2x2 (data 1, fsdp 4, tensor 1)" in out
    assert re.search(r"a device has +16,384.0 MiB", out)
    assert "subtrack" in out and "fits" in out


@pytest.mark.usefixtures("quick_table")
def test_a_plan_that_does_not_fit_names_what_would(capsys):
    flags = ["--topology", "v5e:2x2", "--activation-policy", "none", "--batch", "512"]
    code, out, _ = run(capsys, *flags)
    assert code == 1 and "it does not fit" in out
    assert "--micro-batches 4 would take" in out
    assert "--topology v5e:4x4 --mesh fsdp=-1 would take" in out


def test_bad_plans(capsys):
    code, _, err = run(capsys, "--topology", "v5e:2x2", "--mesh", "fsdp=3")
    assert code == 2 and "names 3 devices, and there are 4" in err
    code, _, err = run(capsys, "--topology", "v5e:16x16")
    assert code == 2 and "the nearest that works is --batch 256" in err


@pytest.fixture
def quick_table(monkeypatch):
    monkeypatch.setattr(plan, "COMPARED", ("adamw", "galore"))


def test_a_budget_is_planned_for_the_rows_of_one_device():
    """Twice the devices, half of what each keeps: kept bytes are a sum over rows."""
    kept = []
    for devices in (2, 4):
        sizes = {"data": 1, "fsdp": devices, "tensor": 1}
        config, model = config_of("adamw", activation_budget="100%")
        tx = optimizers.guarded(config, optimizers.build_optimizer(config))
        kept.append(estimate(config, model, tx, sizes, "v5e").kept)
    assert kept[0] == 2 * kept[1] > 0
