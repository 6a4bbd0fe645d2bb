"""`only_writer` locks the folder of a run; how that is chosen, and its files.

A file is written whole or not at all. What a run can do without, logs and reports,
never stops it: a failure is one line. Files that are read may hold anything.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

from examples.llama.config import TrainConfig, UsageError

# What only a run leaves behind, and another must not write over.
_TRACES = "checkpoints records damaged metrics.jsonl config.json tokenizer.json".split()


def say(line: str) -> None:
    """One line of warning."""
    print(line, file=sys.stderr, flush=True)


def brief(error: BaseException) -> str:
    """An error in a part of a line, without the pages that some libraries add."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else f"{lines[0][:200]} ..."


@contextlib.contextmanager
def usable(what: str) -> Iterator[None]:
    """Whatever the system refuses inside is the caller's to mend."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{what} cannot be used: {brief(error)}") from error


@contextlib.contextmanager
def not_vital(what: str) -> Iterator[None]:
    """Whatever fails inside is a line of warning, and the run goes on."""
    try:
        yield
    except Exception as error:
        say(f"{what} ({brief(error)}); the run goes on")


def choose_run_dir(config: TrainConfig) -> pathlib.Path:
    """The named folder; else the first free default one, or with --resume the last.

    Raises:
        UsageError: it holds a run already.
    """
    if config.run_dir:
        run_dir = pathlib.Path(config.run_dir)
        held = [name for name in _TRACES if os.path.lexists(run_dir / name)]
        if held and not config.resume:
            raise UsageError(
                f"{run_dir} already holds a run: go on with --resume, or give another "
                f"--run-dir (found {', '.join(held)})"
            )
        return run_dir
    last = free = pathlib.Path("runs") / f"{config.preset}-{config.optimizer}"
    number = 1
    while os.path.lexists(free):
        last, number = free, number + 1
        free = free.with_name(f"{config.preset}-{config.optimizer}-{number}")
    return last if config.resume else free


def check_writable(flag: str, folder: pathlib.Path) -> None:
    """Raises unless the folder is one to write in, or can be made."""
    there = folder.absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise UsageError(f"{flag} {folder} cannot be used: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"{flag} {folder} cannot be used: {there} is not writable")


@contextlib.contextmanager
def only_writer(run_dir: pathlib.Path) -> Iterator[None]:
    """Makes the folder and holds its lock.

    The lock is the system's, which takes it back however a process ends. The file names
    its holder, for the message; a name that was left there is of a run that was killed.

    Raises:
        UsageError: another process holds it.
    """
    with usable(f"--run-dir {run_dir}"):
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / "lock").open("a+", errors="replace")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{run_dir} is being written by another run ({_holder(file)}): stop it "
                "first, or give another --run-dir"
            ) from error
        except OSError as error:  # some network file systems have no locks
            say(
                f"{run_dir} cannot be locked ({brief(error)}): start no other run in it"
            )
        if before := _holder(file):
            say(f"the lock of {before} is taken over: that run was killed")
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        with not_vital(f"{run_dir}/lock does not name this run"):
            file.truncate(0)
            file.write(f"{socket.gethostname()}, process {os.getpid()}, since {now}")
            file.flush()
        for left in (*run_dir.glob("*.partial"), *run_dir.glob("records/*.partial")):
            left.unlink(missing_ok=True)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


def _holder(file: Any) -> str:
    file.seek(0)
    return " ".join(file.read(200).split())


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file that other processes see whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The number keeps two processes of a host out of each other's file.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        # The bytes are on the disk before the name is: a rename is atomic.
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)  # or a full disk stays full
        raise


def read_text(path: pathlib.Path, most: int) -> str:
    """The text of a file that may be anything.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no file of up to `most` bytes of UTF-8.
    """
    if os.path.lexists(path) and not path.is_file():  # a pipe would never end
        raise ValueError(f"{path} is no file")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} has more than {most:,} bytes")
    return data.decode()


def parse_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object; ValueError for whatever else it may be."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON of too many levels") from error
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value
