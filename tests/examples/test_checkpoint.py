"""Saving, the record of hashes beside a checkpoint, and what a damaged one does."""

import json
import os
import random
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.llama import checkpoint
from examples.llama.checkpoint import (
    Checkpoints,
    Store,
    find_start,
    on_device,
    orbax_log,
    verify,
)
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
        assert problems[3].endswith("differs from its hash")
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


def test_a_record_of_an_earlier_version(store):
    for step in (1, 2, 3):
        path = store.record_path(step)
        record = json.loads(path.read_text())
        record["sha256"] = record.pop("xxh3_128")
        path.write_text(json.dumps(record))
    with pytest.raises(
        UsageError, match=r"\(3: an earlier version recorded its sha256: not read; 2: "
    ):
        find_start(store, IDENTITY)
    assert store.steps() == [3, 2, 1]


def test_files_of_many_pieces(tmp_path, monkeypatch):
    """Every byte counts, where it lies and how many there are."""
    monkeypatch.setattr(checkpoint, "_PIECE", 64)
    monkeypatch.setattr(checkpoint, "_READ", 24)
    data, seen = bytes(range(200)), set()
    changed = [data[:i] + b"\xff" + data[i + 1 :] for i in range(200)]
    for content in (data, *changed, data[:-1], data[:64], data[:128], b""):
        (tmp_path / "a").write_bytes(content)
        seen.add(checkpoint._digests(tmp_path)["a"])
    assert len(seen) == 205


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


def killed_before_the_record(run_dir, earlier, keep, monkeypatch) -> Store:
    """What a kill leaves between Orbax's commit and the record of the next step."""
    store = save(run_dir, earlier, keep)
    with monkeypatch.context() as patch:

        def kill(*args):
            raise RuntimeError("killed")

        patch.setattr(Store, "write_record", kill)
        patch.setattr(Store, "discard", lambda *args: None)
        save(run_dir, (4,), keep)
    return store


@pytest.mark.parametrize("earlier", [(), (1,), (1, 2, 3)])
@pytest.mark.parametrize("keep", [1, 3])
def test_a_kill_before_the_record_loses_nothing(
    tmp_path, monkeypatch, capsys, earlier, keep
):
    store = killed_before_the_record(tmp_path, earlier, keep, monkeypatch)
    assert store.problem(4) == "it has no record"
    assert set(earlier[-keep:]) < set(store.steps())  # none goes before the record
    capsys.readouterr()
    assert find_start(store, IDENTITY) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "checkpoint 4 was complete but for its record: recorded"
    jax.tree.map(np.testing.assert_array_equal, restored(store, 4), state(4))
    assert store.meta(4)["note"] == 4
    save(tmp_path, (5,), keep)
    assert store.steps() == [5, 4, *earlier[::-1]][:keep]


def test_a_kill_in_the_middle_of_a_save(tmp_path, capsys):
    store = save(tmp_path, (1,))
    store.begin(2, {"identity": IDENTITY})
    (store.folder / "2.orbax-checkpoint-tmp").mkdir()
    assert find_start(store, IDENTITY) == 1
    assert "the save of step 2 was cut off: removed" in capsys.readouterr().err
    assert [path.name for path in store.folder.iterdir()] == ["1"]
    assert [path.name for path in store.records.iterdir()] == ["1.json"]


def spoil_record(store):
    store.record_path(1).write_text("{}")


def spoil_all(store):
    shutil.rmtree(store.folder / "1")
    shutil.rmtree(store.records)
    (store.damaged / "1").mkdir(parents=True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda store: store.record_path(1).unlink(),
        lambda store: shutil.rmtree(store.folder / "1"),
        spoil_record,
        spoil_all,
    ],
)
def test_nothing_is_started_over_that_was_once_saved(tmp_path, spoil):
    store = save(tmp_path, (1,))
    spoil(store)
    with pytest.raises(UsageError, match=r"no good checkpoint in .* another --run-dir"):
        find_start(store, IDENTITY)


def test_damaged_checkpoints_do_not_pile_up(tmp_path, capsys):
    store = save(tmp_path, (1, 2, 3), keep=3)
    for step in (2, 3):
        store.record_path(step).unlink()
    assert find_start(store, IDENTITY) == 1
    save(tmp_path, (2,), keep=3)
    assert store.steps() == [2, 1]
    assert len(list(store.damaged.iterdir())) == 1
    capsys.readouterr()
    save(tmp_path, (3,), keep=3)
    assert store.steps() == [3, 2, 1]
    assert list(store.damaged.iterdir()) == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("removed what was damaged, for --keep 3 newer ones: ")


def test_a_checkpoint_under_another_name_is_refused(store):
    (store.folder / "3").rename(store.folder / "9")
    store.record_path(3).rename(store.record_path(9))
    assert store.newest_good() == (2, {9: "its record is of step 3"})
    for name in ("007", "\u00b2", "\u0663", "9" * 200, "-1", "1.0"):
        (store.folder / name).mkdir()
    assert store.steps() == [9, 2, 1]


def test_a_record_that_is_no_file_or_too_much(store):
    path = store.record_path(3)
    path.unlink()
    os.mkfifo(path)
    assert store.newest_good() == (2, {3: "its record is damaged"})
    path.unlink()
    path.mkdir()
    assert store.newest_good() == (2, {3: "its record is damaged"})
    path.rmdir()
    path.write_text("[" * 100_000)
    assert store.newest_good() == (2, {3: "its record is damaged"})
    with path.open("wb") as file:
        file.truncate(2**40)  # of no bytes on the disk
    assert store.newest_good() == (2, {3: "its record is damaged"})


@pytest.mark.parametrize(
    "meta", [{}, {"identity": None}, {"identity": []}, {"other": {}}, [], None]
)
def test_a_sealed_record_of_something_else(store, meta):
    store.write_record(3, meta)
    assert store.newest_good() == (2, {3: "its record is damaged"})
    store._write(store.record_path(3), {"meta": {"identity": IDENTITY}})
    assert store.newest_good() == (2, {3: "its record is of step None"})


@given(st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1))
@settings(max_examples=200, deadline=None)
def test_any_bytes_of_a_record(saved, changes):
    store = Store(saved)
    path = store.record_path(3)
    before = path.read_bytes()
    changed = bytearray(before)
    for at, byte in changes:
        changed[at % len(changed)] = byte
    path.write_bytes(changed)
    try:
        problem = store.problem(3)
    finally:
        path.write_bytes(before)
    if problem is None:  # other white space is the same record
        assert json.loads(changed) == json.loads(before)


def test_verify(store, capsys):
    assert verify(store)
    store.record_path(2).unlink()
    capsys.readouterr()
    assert not verify(store)
    assert capsys.readouterr().out.splitlines() == [
        "checkpoint 3: good",
        "checkpoint 2: it has no record",
        "checkpoint 1: good",
    ]
    with pytest.raises(UsageError, match="--verify: no checkpoint in"):
        verify(Store(store.folder / "nothing"))


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

    for step, patched in ((4, "begin"), (5, "write_record")):
        with monkeypatch.context() as patch:
            patch.setattr(store, patched, full)
            checkpoints.save(step, state(step), {"identity": IDENTITY})
            checkpoints.wait()
        # What is there of it goes at once, so that a full disk can recover.
        assert store.steps() == [3, 2, 1]
        assert len(list(store.folder.iterdir())) == 3
        assert len(list(store.records.iterdir())) == 3
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"checkpoint {step} could not be saved (No space left on device): none was "
        "before it"
        for step in (4, 5)
    ]
    assert checkpoints.last_saved is None
    checkpoints.save(6, state(6), {"identity": IDENTITY})
    checkpoints.close()
    assert checkpoints.last_saved == 6
    assert store.newest_good() == (6, {})


def test_remains_that_are_still_written_to_go_as_well(store, monkeypatch):
    left = store.folder / "4.orbax-checkpoint-tmp"
    left.mkdir()
    plain, tries = shutil.rmtree, []

    def busy(path, **how):
        tries.append(path)
        if len(tries) > 2:
            plain(path, **how)

    monkeypatch.setattr(shutil, "rmtree", busy)
    store.discard(4)
    assert store.steps() == [3, 2, 1]
    assert not left.exists()


def test_orbax_itself_fails(store, capsys, tmp_path):
    """One line for each save, the pages go to the log, and the next save is well."""
    checkpoints = Checkpoints(store, 3)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = state(4) | {"w": jnp.asarray(np.random.default_rng(0).random((512, 512)))}
    with orbax_log(tmp_path / "orbax.log"):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
            for step in (4, 5):
                checkpoints.save(step, large, {"identity": IDENTITY})
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        lines = capsys.readouterr().err.splitlines()
        assert [line.split(" (")[0] for line in lines] == [
            "checkpoint 4 could not be saved",
            "checkpoint 5 could not be saved",
        ]
        assert len(list(store.folder.iterdir())) == 3
        checkpoints.save(6, large, {"identity": IDENTITY})
        checkpoints.close()
    assert store.newest_good() == (6, {})
    assert capsys.readouterr().err == ""
    assert "Traceback" in (tmp_path / "orbax.log").read_text()


def test_a_record_is_json_for_people(store):
    record = json.loads(store.record_path(3).read_text())
    assert record["step"] == 3
    assert record["files"].keys() == {
        p.relative_to(store.folder / "3").as_posix() for p in data_files(store, 3)
    }
