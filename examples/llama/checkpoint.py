"""`Checkpoints` with Orbax, each with a record of its files' sha256 beside it.

Orbax commits a checkpoint whole or not at all, but restores flipped bits without a
word. A record is written when a checkpoint is complete, and holds the hash of every
file, the configuration and the position in the data. What does not agree with its
record is never restored.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental.layout import Format

from examples.llama.config import TrainConfig, UsageError

_UNRECORDED = "it has no record"


def say(line: str) -> None:
    """One line of warning."""
    print(line, file=sys.stderr, flush=True)


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digests(folder: pathlib.Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _digest(path) for path in files}


def _seal(record: dict[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Store:
    """The checkpoints of a run: `checkpoints/STEP/` and `records/STEP.json`."""

    def __init__(self, run_dir: pathlib.Path):
        self.folder = (run_dir / "checkpoints").absolute()
        self.records = run_dir.absolute() / "records"
        self.damaged = run_dir.absolute() / "damaged"

    def steps(self) -> list[int]:
        """Complete checkpoints, newest first."""
        if not self.folder.is_dir():
            return []
        # Orbax writes under another name and renames at the end: a folder whose name is
        # a number is complete.
        names = (path.name for path in self.folder.iterdir() if path.is_dir())
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def record_path(self, step: int) -> pathlib.Path:
        return self.records / f"{step}.json"

    def write_record(self, step: int, meta: dict[str, Any]) -> None:
        record = {"step": step, "meta": meta}
        record["files"] = _digests(self.folder / str(step))
        record["sha256"] = _seal(record)
        self.records.mkdir(parents=True, exist_ok=True)
        # A rename is atomic, and comes after the bytes are on the disk: a record is
        # there as a whole or not at all.
        partial = self.record_path(step).with_suffix(".partial")
        with partial.open("w") as file:
            json.dump(record, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.record_path(step))
        # Orbax has removed its oldest checkpoints by now, and their records follow.
        kept = {str(s) for s in self.steps()}
        for old in self.records.glob("*.json"):
            if old.stem not in kept:
                old.unlink()

    def problem(self, step: int) -> str | None:
        """What is wrong with a checkpoint, in a few words; None when it is good."""
        try:
            record = json.loads(self.record_path(step).read_text())
            if record.pop("sha256") != _seal(record):
                return "its record is damaged"
        except FileNotFoundError:
            return _UNRECORDED
        # A damaged record may be no JSON, or JSON of any other shape.
        except (ValueError, KeyError, AttributeError, TypeError):
            return "its record is damaged"
        found = _digests(self.folder / str(step))
        for name in sorted(record["files"].keys() | found.keys()):
            if name not in found:
                return f"{name} is missing"
            if name not in record["files"]:
                return f"{name} was added"
            if found[name] != record["files"][name]:
                return f"{name} differs from its sha256"
        return None

    def newest_good(self) -> tuple[int | None, dict[int, str]]:
        """The newest checkpoint without a problem, and the newer ones' problems."""
        problems: dict[int, str] = {}
        for step in self.steps():
            problem = self.problem(step)
            if problem is None:
                return step, problems
            problems[step] = problem
        return None, problems

    def meta(self, step: int) -> dict[str, Any]:
        return json.loads(self.record_path(step).read_text())["meta"]

    def set_aside(self, step: int) -> pathlib.Path:
        """Moves a damaged checkpoint out of the way; nothing is deleted."""
        target = self.damaged / str(step)
        number = 1
        while target.exists():
            number += 1
            target = self.damaged / f"{step}-{number}"
        self.damaged.mkdir(parents=True, exist_ok=True)
        (self.folder / str(step)).rename(target)
        return target


def choose_run_dir(config: TrainConfig) -> pathlib.Path:
    """The named folder; else the first free default one, or with --resume the last."""
    if config.run_dir:
        run_dir = pathlib.Path(config.run_dir)
        if Store(run_dir).steps() and not config.resume:
            raise UsageError(
                f"{run_dir} already holds a run: go on with --resume, or give another "
                "--run-dir"
            )
        return run_dir
    last = path = pathlib.Path("runs") / f"{config.preset}-{config.optimizer}"
    number = 1
    while path.exists():
        last, number = path, number + 1
        path = path.with_name(f"{config.preset}-{config.optimizer}-{number}")
    return last if config.resume else path


def find_start(store: Store, identity: dict[str, Any]) -> int | None:
    """The step to go on from; None when the run has no checkpoint yet.

    Raises:
        UsageError: every checkpoint is damaged, or belongs to another configuration.
    """
    step, problems = store.newest_good()
    if step is None and list(problems.values()) == [_UNRECORDED]:
        (only,) = problems  # the run was killed while it saved for the first time
        say(f"checkpoint {only} is incomplete: moved to {store.set_aside(only)}")
        return None
    if step is None:
        if problems:
            lines = "; ".join(f"{s}: {why}" for s, why in problems.items())
            raise UsageError(
                f"no good checkpoint in {store.folder} ({lines}); start anew in "
                "another --run-dir"
            )
        return None
    saved = store.meta(step)["identity"]
    differing = [
        f"{name}: checkpoint {saved.get(name)!r}, now {identity.get(name)!r}"
        for name in sorted(saved.keys() | identity.keys())
        if saved.get(name) != identity.get(name)
    ]
    if differing:
        raise UsageError(
            f"checkpoint {store.folder / str(step)} is of another configuration "
            f"({'; '.join(differing)}); nothing was changed"
        )
    for bad, problem in problems.items():
        say(
            f"checkpoint {bad} is damaged ({problem}): moved to "
            f"{store.set_aside(bad)}, going back to step {step}"
        )
    return step


class Checkpoints:
    """Saves in the background, keeps the newest few, restores what was verified."""

    def __init__(self, store: Store, keep: int):
        self.store = store
        self.last_saved: int | None = None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=True,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(store.folder, options=options)
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint-record")
        self._pending: tuple[int, concurrent.futures.Future] | None = None

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts a save; a failure is a warning, the checkpoints before it stay."""
        self.wait()
        try:
            # Orbax copies to the host before it returns, so that the next step may take
            # the memory. `force`, or it would drop steps that its rules do not ask for.
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)
        except Exception as error:
            return self._failed(step, error)
        self._pending = (step, self._worker.submit(self._complete, step, meta))

    def _complete(self, step: int, meta: dict[str, Any]) -> None:
        # In a thread of its own, so that training goes on. The record comes last: a
        # checkpoint without one was cut off.
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            self.store.write_record(step, meta)

    def wait(self) -> None:
        """Until the running save is complete, with its record."""
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
            self.last_saved = step
        except Exception as error:
            self._failed(step, error)

    def _failed(self, step: int, error: Exception) -> None:
        say(f"checkpoint {step} could not be saved ({error}); earlier ones stand")

    def restore(self, step: int, abstract: Any) -> Any:
        """The state saved at a step; `abstract` gives shapes, dtypes and devices."""
        try:
            args = ocp.args.StandardRestore(abstract)
            state = self._manager.restore(step, args=args)
        except (ValueError, KeyError) as error:
            raise UsageError(
                f"checkpoint {self.store.folder / str(step)} holds another structure: "
                f"{error}"
            ) from error
        # A state that was just read need not be saved again.
        self.last_saved = step
        return state

    def close(self) -> None:
        self.wait()
        self._worker.shutdown()
        self._manager.close()


def on_device(abstract: Any, shardings: Any = None) -> Any:
    """The same shapes, placed by shardings like them; None: on the first device."""
    if shardings is None:
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda leaf: first, abstract)

    def place(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
        sharding = place.sharding if isinstance(place, Format) else place
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, abstract, shardings)
