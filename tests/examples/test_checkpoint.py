"""Saving, the record of sha256 beside a checkpoint, and what a damaged one does."""

import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.llama.checkpoint import Checkpoints, Store, find_start, on_device
from examples.llama.config import UsageError

IDENTITY = {"rank": 8, "preset": "tiny"}


def state(step: int):
    return {"w": jnp.arange(64.0).reshape(8, 8) + step, "count": jnp.int32(step)}


def save(run_dir, steps=(1, 2, 3), keep=3) -> Store:
    store = Store(run_dir)
    checkpoints = Checkpoints(store, keep)
    for step in steps:
        checkpoints.save(step, state(step), {"identity": IDENTITY, "note": step})
    checkpoints.close()
    return store


def restored(store: Store, step: int):
    checkpoints = Checkpoints(store, 3)
    found = checkpoints.restore(step, on_device(jax.eval_shape(lambda: state(0))))
    checkpoints.close()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    save(run_dir)
    return run_dir


@pytest.fixture
def store(saved, tmp_path) -> Store:
    """A copy of saved checkpoints, to be damaged."""
    shutil.copytree(saved, tmp_path / "run")
    return Store(tmp_path / "run")


def data_files(store: Store, step: int):
    files = (store.folder / str(step)).rglob("*")
    return sorted(path for path in files if path.is_file())


def test_save_and_restore(store):
    assert store.newest_good() == (3, {})
    jax.tree.map(np.testing.assert_array_equal, restored(store, 3), state(3))
    assert store.meta(2)["note"] == 2


def test_only_the_newest_are_kept(tmp_path):
    store = save(tmp_path, steps=(1, 2, 3, 4), keep=2)
    assert store.steps() == [4, 3]
    assert sorted(p.name for p in store.records.iterdir()) == ["3.json", "4.json"]


def test_every_flipped_bit_is_noticed(store):
    draw = random.Random(0)
    files = [path for path in data_files(store, 3) if path.stat().st_size]
    for _ in range(100):
        path = draw.choice(files)
        before = path.read_bytes()
        changed = bytearray(before)
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        step, problems = store.newest_good()
        assert step == 2
        assert problems[3].endswith("differs from its sha256")
        path.write_bytes(before)
    assert store.newest_good() == (3, {})


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "differs from its"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.with_name("extra").write_text(""), "extra was added"),
    ],
    ids=["truncated", "deleted", "added"],
)
def test_other_damage(store, damage, problem):
    damage(max(data_files(store, 3), key=lambda path: path.stat().st_size))
    step, problems = store.newest_good()
    assert step == 2
    assert problem in problems[3]


def test_a_damaged_record(store):
    path = store.record_path(3)
    text = path.read_text()
    for changed in ("", "[]", "{}", text[:-20], text.replace('"note": 3', '"note": 4')):
        path.write_text(changed)
        assert store.newest_good() == (2, {3: "its record is damaged"})
    path.unlink()
    assert store.newest_good() == (2, {3: "it has no record"})


def test_going_back_is_told_in_one_line_and_deletes_nothing(store, capsys):
    path = data_files(store, 3)[0]
    path.write_bytes(path.read_bytes() + b"\0")
    assert find_start(store, IDENTITY) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("checkpoint 3 is damaged (")
    assert line.endswith("going back to step 2")
    assert store.steps() == [2, 1]
    assert (store.damaged / "3").is_dir()
    jax.tree.map(np.testing.assert_array_equal, restored(store, 2), state(2))


def test_no_good_checkpoint_left(store):
    for step in (1, 2, 3):
        store.record_path(step).unlink()
    with pytest.raises(UsageError, match=r"no good checkpoint in .* \(3: it has no"):
        find_start(store, IDENTITY)
    assert store.steps() == [3, 2, 1]


def test_a_kill_during_the_first_save_starts_over(tmp_path, capsys):
    store = save(tmp_path, steps=(1,))
    store.record_path(1).unlink()
    assert find_start(store, IDENTITY) is None
    assert "checkpoint 1 is incomplete: moved to" in capsys.readouterr().err
    assert (store.damaged / "1").is_dir()


def test_another_configuration(store):
    files = [path for step in (1, 2, 3) for path in data_files(store, step)]
    before = [path.read_bytes() for path in files]
    with pytest.raises(
        UsageError, match=r"another configuration \(rank: checkpoint 8, now 4\)"
    ):
        find_start(store, IDENTITY | {"rank": 4})
    assert [path.read_bytes() for path in files] == before


def test_a_run_without_checkpoints_starts(tmp_path):
    assert find_start(Store(tmp_path), IDENTITY) is None


def test_another_structure(store):
    checkpoints = Checkpoints(store, 3)
    wrong = on_device({"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)})
    with pytest.raises(UsageError, match="holds another structure"):
        checkpoints.restore(3, wrong)
    checkpoints.close()


def test_a_failed_save_is_a_warning(store, monkeypatch, capsys):
    checkpoints = Checkpoints(store, 3)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "save", full)
        checkpoints.save(4, state(4), {"identity": IDENTITY})
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_record", full)
        checkpoints.save(5, state(5), {"identity": IDENTITY})
        checkpoints.wait()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        "checkpoint 4 could not be saved",
        "checkpoint 5 could not be saved",
    ]
    checkpoints.save(6, state(6), {"identity": IDENTITY})
    checkpoints.close()
    assert checkpoints.last_saved == 6
    assert store.newest_good() == (6, {})


def test_a_record_is_json_for_people(store):
    record = json.loads(store.record_path(3).read_text())
    assert record["step"] == 3
    assert record["files"].keys() == {
        p.relative_to(store.folder / "3").as_posix() for p in data_files(store, 3)
    }
