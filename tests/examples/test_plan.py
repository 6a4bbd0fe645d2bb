"""`python -m examples.plan`: bytes from shapes, and what is said of them."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import lowrank_optax as lro
from examples.llama import optimizers
from examples.llama.config import TrainConfig, UsageError, resolve
from examples.llama.model import abstract_model, init_params
from examples.llama.placement import make_mesh, param_shardings
from examples.plan import plan
from examples.plan.compiled import Compiled, NoRoom, compile_step
from examples.plan.estimate import estimate, memory_bytes, state_bytes
from lowrank_optax import activations

FEW = ("adamw", "galore", "subtrack", "gwt", "galore_8bit")
ROOT = pathlib.Path(__file__).parents[2]
MESHES = ({"data": 1, "fsdp": 8, "tensor": 1}, {"data": 2, "fsdp": 2, "tensor": 2})


@pytest.mark.parametrize(
    ("text", "gib"),
    [
        ("v5e:16x16", 16),
        ("v4:4x4x8", 32),
        ("v5p:2x2x2", 95),
        ("v6e:4x8", 32),
    ],
)
def test_memory_of_devices(text, gib):
    assert memory_bytes(lro.parse_topology(text)) == gib * 2**30


def test_memory_of_gpus():
    assert memory_bytes(lro.parse_topology("h100:8")) == 80 * 10**9


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


@pytest.mark.parametrize("optimizer", FEW)
def test_state_and_parameters_are_exact(optimizer):
    check_bytes(optimizer, MESHES[1])


def test_state_and_parameters_are_exact_under_fsdp():
    check_bytes("galore", MESHES[0])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", sorted({*optimizers.OPTIMIZERS} - {*FEW}))
def test_state_and_parameters_are_exact_for_every_optimizer(optimizer):
    check_bytes(optimizer, MESHES[1])


def of_layers(optimizer, devices, **flags):
    """Bytes of the state of 7B's layer matrices on one of so many devices."""
    flags = {"preset": "7b", "param_dtype": "bfloat16", **flags}
    config, model = resolve(TrainConfig(optimizer=optimizer, **flags))
    _, params = abstract_model(model)
    kernels = {"layers": {name: params["layers"][name] for name in ("attn", "mlp")}}
    places = param_shardings(
        lro.abstract_mesh({"data": 1, "fsdp": devices, "tensor": 1}), kernels
    )
    return state_bytes(optimizers.build_optimizer(config, places), kernels, places)


@pytest.mark.parametrize("optimizer", ["galore", "subtrack", "gwt"])
def test_a_state_of_low_rank_is_cut_over_all_devices(optimizer):
    """At 7B on 16 devices, rank 1024: a sixteenth of the whole, bases as well."""
    whole, part = of_layers(optimizer, 1), of_layers(optimizer, 16)
    # Counters and the like are everywhere; a kilobyte against hundreds of MiB.
    assert part <= whole / 16 * 1.001 + 4096


def test_scales_that_cannot_be_cut_as_their_codes_are_stay_whole():
    """11,008 columns are 43 blocks: not to be cut in 16."""
    whole, part = of_layers("galore_8bit", 1), of_layers("galore_8bit", 16)
    scales = 32 * 3 * 2 * 1024 * 43 * 4  # layers, matrices, moments
    assert abs(part - scales - (whole - scales) / 16) < 4096


def test_galore_on_the_long_side():
    """By its formula: per layer four square matrices and three with the side f, moments
    `r d` in bfloat16, bases in float32 or bfloat16, a sixteenth on each device."""
    d, f, r, layers = 4096, 11008, 1024, 32
    _, model = resolve(TrainConfig(preset="7b", param_dtype="bfloat16"))
    tree = abstract_model(model)[1]["layers"]
    kernels = {"layers": {name: tree[name] for name in ("attn", "mlp")}}
    places = param_shardings(
        lro.abstract_mesh({"data": 1, "fsdp": 16, "tensor": 1}), kernels
    )
    for dtype in (jnp.float32, jnp.bfloat16):
        tx = lro.galore(1e-2, r, side="long", basis_dtype=dtype, layer_axis=0)
        moments = 2 * 2 * r * 7 * d
        bases = jnp.dtype(dtype).itemsize * r * (4 * d + 3 * f)
        found = state_bytes(tx, kernels, places)
        # Over it are a counter, a key and a flag for each of the 224 matrices.
        assert 0 <= found - layers * (moments + bases) // 16 <= 1024
    assert found // 2**20 == 417  # AdamW in bfloat16: 1544


SHAPE = "--batch-size 16 --seq-len 256 --micro-batches 1 --param-dtype bfloat16".split()


def run(capsys, *flags):
    code = plan.main(["--preset", "130m", *SHAPE, *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.usefixtures("quick_table")
def test_a_plan_that_fits(capsys):
    code, out, _ = run(capsys, "--topology", "v5e:2x2", "--optimizer", "subtrack")
    assert code == 0
    assert "4 devices of v5e:2x2 (data 1, fsdp 4, tensor 1)" in out
    assert re.search(r"a device has +16,384.0 MiB", out)
    assert "subtrack" in out and "fits" in out


@pytest.mark.whole
@pytest.mark.usefixtures("quick_table")
def test_a_plan_that_does_not_fit_names_what_would(capsys):
    flags = [
        "--topology",
        "v5e:2x2",
        "--activation-policy",
        "none",
        "--batch-size",
        "512",
    ]
    code, out, _ = run(capsys, *flags)
    assert code == 1 and "it does not fit" in out
    assert "--micro-batches 4 would take" in out
    assert "--activation-policy adacc would take" in out
    assert "--topology v5e:4x4 --mesh fsdp=-1 would take" in out
    assert "--optimizer gwt" not in out  # its state is not what is too large


@pytest.mark.whole
@pytest.mark.usefixtures("quick_table")
def test_where_one_change_is_not_enough_two_are_named(capsys):
    flags = [
        "--topology",
        "v5e:1x1",
        "--activation-policy",
        "none",
        "--batch-size",
        "4",
    ]
    code, out, _ = run(capsys, *flags, "--seq-len", "6144")
    assert code == 1
    assert re.search(r"it does not fit; --activation-policy full --micro-batches", out)


def test_bad_plans(capsys):
    code, _, err = run(capsys, "--topology", "v9:2x2")
    assert code == 2 and "unknown topology 'v9:2x2': expected v5e or v6e" in err
    code, _, err = run(capsys, "--topology", "v5e:2x2", "--mesh", "fsdp=3")
    assert code == 2 and "names 3 devices, and there are 4" in err
    code, _, err = run(capsys, "--topology", "v5e:16x16", "--mesh", "fsdp=-1")
    assert code == 2 and "the nearest that works is --batch-size 256" in err
    code, _, err = run(capsys, "--topology", "v5e:2x2", "--activation-budget", "x")
    assert code == 2 and "must be a percentage" in err


def test_a_plan_is_of_the_run_that_the_trainer_would_make():
    """One configuration: flags and defaults are the trainer's, whatever the preset."""
    own = {field.name for field in dataclasses.fields(plan.PlanConfig)}
    trainers = dataclasses.fields(TrainConfig)
    assert own - {field.name for field in trainers} == {"topology", "memory", "compile"}
    for preset, flags in (("tiny", {}), ("1b", {}), ("60m", {"micro_batches": 2})):
        found = plan.plan_run(
            plan.PlanConfig(preset=preset, topology="v5e:2x2", **flags)
        )
        config, model = resolve(TrainConfig(preset=preset, **flags))
        assert dataclasses.replace(found.config, mesh="") == config
        assert found.model == model


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("22.5GiB", 45 * 2**29), ("512 mb", 512 * 10**6), ("9", 9)],
)
def test_memory_in_words(text, size):
    found = plan.plan_run(plan.PlanConfig(memory=text))
    assert found.memory_bytes == size and found.topology.devices == 1
    assert plan.verdict(size, found.topology, size) == "close: --compile"
    for wrong in ("24 bananas", "GB", "0", "-3GB", "1.2.3GB"):
        with pytest.raises(UsageError, match="--memory must be a size such as 24GB"):
            plan.parse_memory(wrong)


@pytest.mark.parametrize(
    ("text", "gb"),
    [
        ("RTX 3090", 24),
        ("4090:2", 24),
        ("rtx5090:1", 32),
        ("A100-40GB:8", 40),
        ("a100-80:8", 80),
        ("h200", 141),
    ],
)
def test_cards_as_people_write_them(text, gb):
    topology = lro.parse_topology(text)
    assert memory_bytes(topology) == gb * 10**9 and not topology.is_tpu


def test_what_is_stored_otherwise_and_layer_by_layer_is_counted():
    def parts(**flags):
        return plan.plan_run(
            plan.PlanConfig(preset="60m", topology="v5e:1x1", **flags)
        ).parts()

    plain = parts(activation_policy="full")
    codes = parts(activation_policy="full", weights="int8")
    assert codes.parameters < plain.parameters and codes.loaded == plain.parameters
    assert parts(layerwise=True).gradients < plain.gradients
    far = parts(activation_policy="full", state_memory="pinned_host")
    assert (far.state, far.host) == (plain.state, plain.host)[::-1] != (0, 0)
    assert far.total == plain.total - plain.state


@pytest.mark.usefixtures("quick_table")
def test_a_state_in_the_hosts_memory_is_not_on_the_device(capsys):
    flags = ["--topology", "v5e:2x2", "--state-memory", "pinned_host"]
    _, out, _ = run(capsys, *flags, "--optimizer", "subtrack")
    sizes = dict(re.findall(r"^  (\w[\w ]*\w) +([0-9.,]+) MiB$", out, re.M))
    assert sizes["state"] == "0.0"
    rows = re.findall(r"subtrack +256 .* ([0-9.,]+) MiB +([0-9.,]+) MiB", out)
    assert (sizes["state in host"], sizes["at the fullest"]) in rows
    code, _, err = run(capsys, *flags, "--compile")
    assert code == 2 and "--compile counts a state on the device" in err


def test_compiling_needs_the_compiler(capsys, monkeypatch):
    code, _, err = run(capsys, "--topology", "h100:8", "--compile")
    assert code == 2 and "--compile has the TPU's compiler alone" in err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run(capsys, "--topology", "v5e:2x2", "--compile")
    assert code == 2 and "pip install '.[tpu]'" in err


@pytest.mark.whole
def test_the_compiler_decides(capsys, monkeypatch):
    monkeypatch.setattr(plan, "COMPARED", ())
    monkeypatch.setattr(plan, "require_compiler", lambda topology: None)

    def no_room(run):
        raise NoRoom("the TPU's compiler finds no room for it: 20G of 16G")

    monkeypatch.setattr(plan, "compile_run", no_room)
    flags = ["--topology", "v5e:2x2", "--optimizer", "apollo_mini", "--compile"]
    code, out, err = run(capsys, *flags)
    assert code == 1 and not err
    assert "estimate for one device: fits" in out and "finds no room" in out
    assert re.search(r"apollo_mini +- +bfloat16", out)  # its rank is its own
    audit = activations.Audit(2**30, 0, 0, 20 * 2**30, None, None)
    found = Compiled(audit, 0, 1.0, 1.0, [], "")
    monkeypatch.setattr(plan, "compile_run", lambda run: found)
    assert run(capsys, *flags)[0] == 1


@pytest.mark.tpu_aot
def test_the_compiled_step_takes_what_was_estimated():
    pytest.importorskip("libtpu")
    command = [sys.executable, "-m", "examples.plan", "--preset", "60m"]
    options = (
        "--topology v5e:2x2 --batch-size 64 --seq-len 512 --rank 64 --compile".split()
    )
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    off = re.search(r"together .* the estimate ([-+][\d.]+) %", done.stdout)
    assert off is not None and abs(float(off[1])) <= 10
    assert re.search(r"sent by the optimizer: .*all-", done.stdout)


@pytest.fixture
def quick_table(monkeypatch):
    monkeypatch.setattr(plan, "COMPARED", ("adamw", "gwt"))


@pytest.mark.whole
def test_a_budget_is_planned_for_the_rows_of_one_device():
    """Twice the devices, half of what each keeps: kept bytes are a sum over rows."""
    kept = []
    for devices in (2, 4):
        sizes = {"data": 1, "fsdp": devices, "tensor": 1}
        config, model = config_of("adamw", activation_budget="100%")
        tx = optimizers.guarded(config, optimizers.build_optimizer(config))
        kept.append(estimate(config, model, tx, sizes, "v5e").kept)
    assert kept[0] == 2 * kept[1] > 0


def test_the_trainer_does_without_the_planner():
    files = list((ROOT / "examples" / "llama").glob("*.py"))
    assert len(files) > 10
    assert not [path.name for path in files if "examples.plan" in path.read_text()]


def test_a_layer_wise_step_is_what_is_compiled():
    """Its gradients are those of one layer, so it needs less beside the arguments."""
    temporaries = []
    for layerwise in (False, True):
        flags = plan.PlanConfig(
            preset="tiny", optimizer="galore", layerwise=layerwise,
            batch_size=1, micro_batches=1, seq_len=16, topology="v5e:1x1",
        )  # fmt: skip
        run = plan.plan_run(flags)
        mesh = make_mesh(run.sizes, jax.devices()[:1])
        found = compile_step(run.config, run.model, run.optimizer, mesh, None)
        temporaries.append(found.audit.temp_bytes)
    assert temporaries[1] < 0.8 * temporaries[0]
