"""`shard_hashes` reads whole shards once, and notes what it found.

`hashes.json` in the cache folder holds size, time and sha256 of files by their path. A
file whose size and time are as noted is not read again.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from examples.llama.run_folder import (
    not_vital,
    parse_object,
    read_text,
    say,
    write_whole,
)

_LARGEST = 2**28  # bytes of the notes
_MUCH = 2**32  # bytes that take more than a moment to read
# A file may change twice within what a file system calls one time.
_SETTLED = 3 * 10**9  # nanoseconds


def shard_hashes(
    paths: Sequence[pathlib.Path], cache_dir: str = ""
) -> list[tuple[int, str]]:
    """Size and sha256 of every file, noted in the folder if one is named.

    Raises:
        OSError: a file cannot be read; `filename` is its path.
    """
    notes_path = pathlib.Path(cache_dir) / "hashes.json"
    notes = _read(notes_path) if cache_dir else {}
    now = time.time_ns()
    names = [str(path.absolute()) for path in paths]
    found = [os.stat(path) for path in paths]
    states = [[stat.st_size, stat.st_mtime_ns] for stat in found]
    unknown = [
        i for i, (name, state) in enumerate(zip(names, states, strict=True))
        if not _is_note(notes.get(name)) or notes[name][:2] != state
    ]  # fmt: skip
    if (size := sum(states[i][0] for i in unknown)) > _MUCH:
        again = "; once, as --cache-dir notes it" if cache_dir else ""
        say(f"hashing {size / 2**30:,.1f} GiB of text{again}")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        hashed = pool.map(_hash, (paths[i] for i in unknown))
        fresh = {
            names[i]: [*states[i], digest]
            for i, digest in zip(unknown, hashed, strict=True)
        }
    settled = {k: note for k, note in fresh.items() if now - note[1] > _SETTLED}
    if cache_dir and settled:
        with not_vital(f"{notes_path} was not written"):
            write_whole(notes_path, json.dumps(notes | settled, indent=0))
    return [(note[0], note[2]) for note in (fresh.get(n) or notes[n] for n in names)]


def _hash(path: pathlib.Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        error.filename = str(path)  # of a failing disk, Python does not know it
        raise


def _read(path: pathlib.Path) -> dict[str, Any]:
    """The notes; none where the file is missing or anything else."""
    try:
        return parse_object(read_text(path, _LARGEST))
    except (OSError, ValueError):
        return {}


def _is_note(note: Any) -> bool:
    if not (isinstance(note, list) and len(note) == 3 and isinstance(note[2], str)):
        return False
    return len(note[2]) == 64 and set(note[2]) <= set("0123456789abcdef")
