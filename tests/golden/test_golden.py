"""The released optimizers' own trajectories, step by step.

`tests/golden/data` holds the cases that travel with the repository. Further ones are
found in the folder GOLDEN_DIR; their gradient files may lie beside them, in the data
folder, or in GRADIENTS_DIR.
"""

import collections
import dataclasses
import json

import numpy as np
import pytest

from tests.golden import cases
from tests.golden.registry import METHODS
from tests.golden.replay import complaints, run
from tests.golden.tracking import subtrackpp


def trajectories():
    """Every case; those that do not travel with the repository are variants."""
    for path in cases.files():
        marks = () if path.parent == cases.DATA else pytest.mark.variant
        yield pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.parametrize("path", list(trajectories()))
def test_trajectory(path):
    config = cases.read_config(path)
    if config is None:
        pytest.skip(f"{path.name} holds gradients, not a case")
    method = cases.method_of(path, config)
    if method not in METHODS:
        pytest.skip(f"method {method} is not built yet ({path.name})")
    case = cases.load(path)
    replay = METHODS[method](case)
    case.config.check_all_used()
    assert not complaints(case, replay)


def test_data_folder_is_complete_and_small():
    paths = list(cases.DATA.glob("*.npz"))
    configs = {path: c for path in paths if (c := cases.read_config(path))}
    methods = collections.Counter(
        cases.method_of(path, config) for path, config in configs.items()
    )
    assert methods == {
        "galore_adamw": 14,
        "galore_adafactor": 7,
        "fira_adamw": 2,
        "subtrackpp": 8,
        "ldadam": 3,
        "apollo": 4,
        "coap": 2,
        "dct_adamw": 3,
        "online_subspace_descent": 4,
        "gwt": 2,
        "scale": 1,
        "alice": 1,
        "dion": 1,
        "dion2": 1,
        "foam": 1,
        "sinkgd": 1,
        "racs": 1,
    }
    named = {config["gradients"] for config in configs.values()}
    assert named <= {path.name for path in paths}
    assert sum(path.stat().st_size for path in paths) <= 9 * 2**20


def test_a_paper_case_in_float32():
    """The float64 replays of the paper's cases say nothing about the usual dtype."""
    case = cases.load(cases.DATA / "subtrackpp_paper_r4_k5_pa_rs_debiased.npz")
    assert not complaints(case, subtrackpp(case, x64=False))


def test_the_transposed_gradients_give_the_transposed_run():
    """Wide matrices turned around are tracked as tall ones."""
    case = cases.load(cases.DATA / "subtrackpp_official_r8_k5_rs_s025.npz")
    replay = METHODS[case.method](case)
    wide, _ = run(case, replay)
    turned = dataclasses.replace(
        case,
        arrays={**case.arrays, "params_wide": case.params("wide").swapaxes(1, 2)},
        gradients={**case.gradients, "wide": case.gradients["wide"].swapaxes(1, 2)},
    )
    tall, _ = run(turned, replay)
    for step, params in wide.items():
        # The same sums in another order, through 25 steps of Adam.
        np.testing.assert_allclose(tall[step]["wide"].T, params["wide"], atol=1e-5)
    assert np.abs(wide[25]["wide"] - wide[0]["wide"]).max() > 0.1


# The harness itself: each test below breaks one thing that it has to notice.

SAMPLE = "galore_adamw_r4_T5_s1_wd0.1.npz"


def sample(changes=None, drop=()):
    config = dict(cases.read_config(cases.DATA / SAMPLE) or {})
    config.update(changes or {})
    for key in drop:
        del config[key]
    case = cases.load(cases.DATA / SAMPLE)
    return dataclasses.replace(case, config=cases.Config(config))


def play(case):
    replay = METHODS[case.method](case)
    case.config.check_all_used()
    return complaints(case, replay)


def test_unknown_config_key_fails():
    with pytest.raises(ValueError, match=r"does not know.*nesterov=True"):
        play(sample({"nesterov": True}))


@pytest.mark.parametrize("key", ["proj_type", "dtype"])
def test_unknown_choice_fails(key):
    with pytest.raises(KeyError, match="sideways"):
        play(sample({key: "sideways"}))


def test_missing_config_key_fails():
    with pytest.raises(KeyError, match="betas"):
        play(sample(drop=["betas"]))


def test_other_refresh_steps_fail():
    with pytest.raises(ValueError, match="not every 4 steps"):
        play(sample({"update_proj_gap": 4}))


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 0.0101},
        {"eps": 1e-4},
        {"scale": 0.99},
        {"weight_decay": 0.11},
        {"betas": [0.9, 0.998]},
        {"bias_correction": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_hyperparameter_is_noticed(changes):
    assert any("params" not in c and "after step" in c for c in play(sample(changes)))


def test_flipped_basis_vector_is_noticed():
    case = sample()
    case.arrays["proj_tall"][2, 0] *= -1
    found = play(case)
    assert any(c.startswith("tall after step 16") for c in found)
    assert not any(c.startswith(("wide", "square", "bias")) for c in found)


def write(folder, name, config):
    with np.load(cases.DATA / SAMPLE) as stored:
        arrays = {key: stored[key] for key in stored.files if key != "config"}
    folder.mkdir(exist_ok=True)
    np.savez(folder / name, config=np.array(json.dumps(config)), **arrays)


def test_extra_folder(tmp_path, monkeypatch):
    config = cases.read_config(cases.DATA / SAMPLE)
    assert config is not None
    write(tmp_path / "held", "held_back.npz", {**config, "gradients": "elsewhere.npz"})
    monkeypatch.setenv("GOLDEN_DIR", str(tmp_path / "held"))
    held = tmp_path / "held" / "held_back.npz"
    assert held in cases.files()
    with pytest.raises(FileNotFoundError, match=r"elsewhere\.npz .* GRADIENTS_DIR"):
        cases.load(held)

    gradients = cases.DATA / str(config["gradients"])
    (tmp_path / "elsewhere.npz").write_bytes(gradients.read_bytes())
    monkeypatch.setenv("GRADIENTS_DIR", str(tmp_path))
    assert cases.load(held).names == cases.load(cases.DATA / SAMPLE).names

    monkeypatch.setenv("GOLDEN_DIR", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="GOLDEN_DIR"):
        cases.files()


def test_same_file_in_two_folders_counts_once(tmp_path, monkeypatch):
    monkeypatch.delenv("GOLDEN_DIR", raising=False)
    before = cases.files()
    (tmp_path / SAMPLE).write_bytes((cases.DATA / SAMPLE).read_bytes())
    monkeypatch.setenv("GOLDEN_DIR", str(tmp_path))
    assert cases.files() == before


def test_method_of_a_case_without_the_key():
    assert cases.method_of(cases.DATA / "gwt_haar_l1.npz", {}) == "gwt"
