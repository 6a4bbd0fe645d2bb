"""`Checkpoints` with Orbax, each with a record of its files' hashes beside it.

Orbax commits a checkpoint whole or not at all, but restores flipped bits without a
word. A record is written when a checkpoint is complete, and holds the hash of every
file, the configuration and the position in the data. What does not agree with its
record is never restored, and nothing older goes before the record is there.

The hash is xxh3 of 128 bits, which is faster than a disk. It finds damage; who means
harm could write the record as well.
"""

import concurrent.futures
import contextlib
import json
import logging
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
import xxhash
from jax.experimental.layout import Format

from examples.llama.config import UsageError
from examples.llama.processes import any_of, found_by_first, is_first
from examples.llama.run_folder import (
    brief,
    not_vital,
    parse_object,
    read_text,
    say,
    write_whole,
)

_STEP = re.compile(r"0|[1-9][0-9]{0,17}")
_UNFINISHED = "*.orbax-checkpoint-tmp*"  # Orbax renames at the end
_LARGEST_RECORD = 2**22  # bytes
_PIECE = 2**24  # bytes of a file that one thread hashes at a time
_READ = 2**18  # of these, so many at once, which stay in the core's cache
_SEAL = "xxh3_128"


def _hash_piece(path: pathlib.Path, start: int) -> bytes:
    digest, buffer, left = xxhash.xxh3_128(), memoryview(bytearray(_READ)), _PIECE
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (count := file.readinto(buffer[:left])):
            digest.update(buffer[:count])
            left -= count
    return digest.digest()


def _digests(folder: pathlib.Path) -> dict[str, str]:
    """The hash of the hashes of a file's pieces, by the name in the folder.

    In pieces, since one hash over a file of gigabytes would keep one core busy, and a
    checkpoint is few large files.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pieces = {
            path.relative_to(folder).as_posix(): [
                pool.submit(_hash_piece, path, start)
                for start in range(0, max(path.stat().st_size, 1), _PIECE)
            ]
            for path in files
        }
        return {
            name: xxhash.xxh3_128_hexdigest(b"".join(p.result() for p in parts))
            for name, parts in pieces.items()
        }


def _sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the hash of its own."""
    text = json.dumps(record, sort_keys=True)
    return record | {_SEAL: xxhash.xxh3_128_hexdigest(text.encode())}


class Store:
    """The checkpoints of a run: `checkpoints/STEP/` and `records/STEP.json`.

    `records/STEP.saving` holds what the record will say beside the hashes, from before
    a save until its record: a kill in between leaves nothing that cannot be completed.
    """

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
        return sorted((int(n) for n in names if _STEP.fullmatch(n)), reverse=True)

    def record_path(self, step: int) -> pathlib.Path:
        return self.records / f"{step}.json"

    def _saving_path(self, step: int) -> pathlib.Path:
        return self.records / f"{step}.saving"

    def begin(self, step: int, meta: dict[str, Any]) -> None:
        """Notes, before a save, what its record will say."""
        self._write(self._saving_path(step), {"step": step, "meta": meta})

    def write_record(self, step: int, meta: dict[str, Any]) -> None:
        """Makes a complete checkpoint one that may be restored."""
        files = _digests(self.folder / str(step))
        self._write(
            self.record_path(step), {"step": step, "meta": meta, "files": files}
        )
        self._saving_path(step).unlink(missing_ok=True)

    def _write(self, path: pathlib.Path, record: dict[str, Any]) -> None:
        write_whole(path, json.dumps(_sealed(record), indent=1, sort_keys=True))

    def _read(self, path: pathlib.Path) -> dict[str, Any]:
        """The record that its file's name promises.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is another, or none that this program wrote.
        """
        record: dict[str, Any] = {}
        try:
            record = parse_object(read_text(path, _LARGEST_RECORD))
            seal = record.pop(_SEAL)
            meta, files = record["meta"], record.get("files", {})
            good = (
                _sealed(record)[_SEAL] == seal
                and isinstance(meta, dict)
                and isinstance(meta["identity"], dict)
                and isinstance(files, dict)
            )
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            good = False
        if not good and "sha256" in record:
            raise ValueError("an earlier version recorded its sha256: not read")
        if not good:
            raise ValueError("its record is damaged")
        if str(step := record.get("step")) != path.stem:
            raise ValueError(f"its record is of step {step}")
        return record

    def problem(self, step: int) -> str | None:
        """What is wrong with a checkpoint, in a few words; None when it is good."""
        try:
            recorded = self._read(self.record_path(step)).get("files", {})
            found = _digests(self.folder / str(step))
        except FileNotFoundError:
            return "it has no record"
        except ValueError as error:
            return str(error)
        except OSError as error:
            return f"it cannot be read: {brief(error)}"
        for name in sorted(recorded.keys() | found.keys()):
            if name not in found:
                return f"{name} is missing"
            if name not in recorded:
                return f"{name} was added"
            if found[name] != recorded[name]:
                return f"{name} differs from its hash"
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
        return self._read(self.record_path(step))["meta"]

    def settle(self) -> None:
        """Completes or clears what a killed run was about to save."""
        for path in self.folder.glob(_UNFINISHED):
            say(f"the save of step {path.name.split('.')[0]} was cut off: removed")
            shutil.rmtree(path)
        for path in sorted(self.records.glob("*.saving")):
            step = int(path.stem) if _STEP.fullmatch(path.stem) else -1
            if step in self.steps() and not self.record_path(step).exists():
                with contextlib.suppress(ValueError):  # then it has no record
                    self.write_record(step, self._read(path)["meta"])
                    say(f"checkpoint {step} was complete but for its record: recorded")
            path.unlink(missing_ok=True)

    def set_aside(self, step: int) -> pathlib.Path:
        """Moves a damaged checkpoint and its record out of the way."""
        target = self.damaged / str(step)
        number = 1
        while target.exists():
            number += 1
            target = self.damaged / f"{step}-{number}"
        self.damaged.mkdir(parents=True, exist_ok=True)
        (self.folder / str(step)).rename(target)
        with contextlib.suppress(FileNotFoundError):
            self.record_path(step).rename(target.with_suffix(".json"))
        return target

    def discard(self, step: int) -> None:
        """Removes what a save that failed has left."""
        self.sweep()
        shutil.rmtree(self.folder / str(step), ignore_errors=True)
        for path in (self._saving_path(step), self.record_path(step)):
            path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Removes unfinished saves, while none is under way."""
        # Where one of Orbax' threads has failed, others may still make files for a
        # moment, and a folder is not removed under them.
        for _ in range(20):
            left = [*self.folder.glob(_UNFINISHED)]
            for path in left:
                shutil.rmtree(path, ignore_errors=True)
            if not left:
                return
            time.sleep(0.05)

    def prune(self, keep: int) -> None:
        """Leaves the newest checkpoints, and damaged ones while there are too few."""
        good = [step for step in self.steps() if self.record_path(step).exists()]
        for step in good[keep:]:
            # In this order: without its record it is no checkpoint any more.
            self.record_path(step).unlink()
            shutil.rmtree(self.folder / str(step))
        others = [self.folder / str(s) for s in self.steps() if s not in good]
        if self.damaged.is_dir():
            others += [path for path in self.damaged.iterdir() if path.is_dir()]
        others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        if gone := others[max(keep - len(good), 0) :]:
            for path in gone:
                shutil.rmtree(path)
                path.with_suffix(".json").unlink(missing_ok=True)
            names = ", ".join(path.name for path in gone)
            say(f"removed what was damaged, for --keep {keep} newer ones: {names}")


def find_start(
    store: Store, identity: dict[str, Any], free: Collection[str] = ()
) -> int | None:
    """The step to go on from; None when the run has no checkpoint yet.

    What is named in `free` may differ: the state will be carried over.

    Raises:
        UsageError: every checkpoint is damaged, or belongs to another configuration.
    """
    store.settle()
    step, problems = store.newest_good()
    if step is None:
        # Nothing good is not nothing: whatever was once saved forbids to start over.
        why = [f"{s}: {problem}" for s, problem in problems.items()]
        for folder in (store.records, store.damaged):
            if folder.is_dir():
                why += [f"found {folder.name}/{p.name}" for p in folder.iterdir()]
        if why:
            raise UsageError(
                f"no good checkpoint in {store.folder} ({'; '.join(why[:5])}); start "
                "anew in another --run-dir"
            )
        return None
    saved = store.meta(step)["identity"]
    names = sorted(saved.keys() | identity.keys())
    differing = [name for name in names if saved.get(name) != identity.get(name)]
    if not {*differing} <= {*free}:
        found = "; ".join(
            f"{name}: checkpoint {saved.get(name)!r}, now {identity.get(name)!r}"
            for name in differing
        )
        raise UsageError(
            f"checkpoint {store.folder / str(step)} is of another configuration "
            f"({found}); nothing was changed"
        )
    for bad, problem in problems.items():
        say(
            f"checkpoint {bad} is damaged ({problem}): moved to "
            f"{store.set_aside(bad)}, going back to step {step}"
        )
    return step


def verify(store: Store) -> bool:
    """Says of every checkpoint whether it is good; whether all are.

    Raises:
        UsageError: there is none.
    """
    problems = {step: store.problem(step) for step in store.steps()}
    if not problems:
        raise UsageError(f"--verify: no checkpoint in {store.folder}")
    for step, problem in problems.items():
        print(f"checkpoint {step}: {problem or 'good'}", flush=True)
    return not any(problems.values())


class Checkpoints:
    """Saves in the background, keeps the newest few, restores what was verified."""

    def __init__(self, store: Store, keep: int):
        self.store, self.keep = store, keep
        self.last_saved: int | None = None
        for folder in (
            store.folder,
            store.records,
        ):  # refused now, not at the first save
            folder.mkdir(parents=True, exist_ok=True)
        self._orbax = ocp.StandardCheckpointer()
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint-record")
        self._pending: tuple[int, concurrent.futures.Future] | None = None

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts a save; a failure is a warning, the checkpoints before it stay."""
        self.wait()
        try:
            # Orbax brings all processes together, so all must know of a failure here.
            found_by_first(lambda: self.store.begin(step, meta))
            # Orbax copies to the host before it returns, so that the next step may take
            # the memory.
            self._orbax.save(self.store.folder / str(step), state)
        except Exception as error:
            return self._failed(step, error)
        self._pending = (step, self._worker.submit(self._complete, step, meta))

    def _complete(self, step: int, meta: dict[str, Any]) -> None:
        # In a thread of its own, so that training goes on. The record comes last: a
        # checkpoint without one was cut off. And nothing goes before it is there.
        self._orbax.wait_until_finished()
        if is_first():
            self.store.write_record(step, meta)
            with not_vital("old checkpoints were not removed"):
                self.store.prune(self.keep)

    def wait(self) -> None:
        """Until the running save is complete, with its record. All processes ask."""
        self._settle(any_of)

    def _settle(self, agreed: Callable[[Callable[[], bool]], Callable[[], bool]]):
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        error = future.exception()
        # What one process could not save is saved for none.
        if agreed(lambda: error is not None)():
            self._failed(step, error or RuntimeError("another process failed"))
        else:
            self.last_saved = step

    def _failed(self, step: int, error: BaseException) -> None:
        if is_first():
            self.store.discard(step)
        last = self.last_saved
        stands = "none was before it" if last is None else f"that of step {last} stands"
        say(f"checkpoint {step} could not be saved ({brief(error)}): {stands}")

    def restore(self, step: int, abstract: Any) -> Any:
        """The state saved at a step; `abstract` gives shapes, dtypes and devices."""
        try:
            state = self._orbax.restore(self.store.folder / str(step), abstract)
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UsageError(
                f"checkpoint {self.store.folder / str(step)} holds another structure: "
                f"{error}"
            ) from error
        # A state that was just read need not be saved again.
        self.last_saved = step
        return state

    def close(self) -> None:
        """Ends this process' part, also when the others will never ask again."""
        self._settle(lambda failed: failed)
        self._worker.shutdown()
        self._orbax.close()
        if is_first():
            self.store.sweep()


@contextlib.contextmanager
def orbax_log(path: pathlib.Path) -> Iterator[None]:
    """What Orbax says of a failure, page after page, goes to a file."""

    class Log(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            # A disk that is full for a checkpoint may be for this line as well.
            with contextlib.suppress(OSError), path.open("a") as file:
                file.write(self.format(record) + "\n")

    handler, before = Log(logging.WARNING), sys.unraisablehook
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    were = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    # What the callbacks of TensorStore raise can end nothing, and is printed by Python.
    sys.unraisablehook = lambda raised: loggers[0].error(
        "in a callback", exc_info=raised.exc_value
    )
    try:
        yield
    finally:
        sys.unraisablehook = before
        for logger, (handlers, propagate) in zip(loggers, were, strict=True):
            logger.handlers, logger.propagate = handlers, propagate


def on_device(abstract: Any, shardings: Any = None) -> Any:
    """The same shapes, placed by shardings like them; None: on the first device."""
    if shardings is None:
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda leaf: first, abstract)

    def place(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
        sharding = place.sharding if isinstance(place, Format) else place
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, abstract, shardings)
