"""`FAULTS` disturb the trainer in every way but a kill, which is `tests/storm.py`.

`python -m tests.faults [NAME ...]` runs all of them, or those named, and prints a line
for each. A disk of its own, for a full and a read-only one, needs the right to mount;
without it that fault is said to be skipped.
"""

import contextlib
import json
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from tests.runs import end, fingerprint, last_step, launch

PATIENCE = 300.0
SHORT = ("--optimizer", "galore", "--steps", "40")
LONG = ("--optimizer", "galore", "--steps", "1000000")


def run(work: pathlib.Path, name: str, *flags: str, **how) -> tuple[int, str]:
    (ended,) = end(launch(work, work / name, *flags, **how), PATIENCE)
    return ended


def running(work: pathlib.Path, name: str, *flags: str, **how) -> subprocess.Popen:
    """A run that has trained some steps, whatever the log held before."""
    before = last_step(work / name)
    (process,) = launch(work, work / name, *flags, **how)
    until = time.monotonic() + PATIENCE
    while last_step(work / name) < before + 12 and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.05)
    return process


def expect(ended: tuple[int, str], code: int, *patterns: str) -> None:
    found, output = ended
    assert found == code, f"exit code {found}, not {code}: {output[-2000:]}"
    assert "Traceback" not in output, output[-3000:]
    for pattern in patterns:
        assert re.search(pattern, output), f"no {pattern!r} in: {output[-2000:]}"


def stopped(process: subprocess.Popen, *numbers: int) -> tuple[int, str]:
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.3)
    (ended,) = end([process], 60)
    return ended


def only_whole_ones(run_dir: pathlib.Path) -> None:
    left = [p.name for p in (run_dir / "checkpoints").iterdir() if not p.name.isdigit()]
    assert not left, f"left behind: {left}"


def no_large_files(work: pathlib.Path) -> None:
    """A quota: no save succeeds, then there is room again."""
    ended = run(work, "quota", *SHORT, largest=60_000)
    expect(
        ended, 1, "checkpoint 5 could not be saved", "could not be saved; there is no"
    )
    only_whole_ones(work / "quota")
    expect(run(work, "quota", *SHORT, "--resume"), 0)
    expect(run(work, "whole", *SHORT), 0)
    assert fingerprint(work / "quota") == fingerprint(work / "whole")
    process = running(work, "asked", *LONG, largest=60_000)
    expect(
        stopped(process, signal.SIGTERM), 1, "step .* could not be saved; there is no"
    )


def own_disk(work: pathlib.Path) -> None:
    """A small disk that is full, has room again, and is then read-only."""
    disk = work / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        raise Skipped("no right to mount")
    try:
        process = running(work, "disk/run", *LONG)
        ballast = disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(65536))
        time.sleep(2)
        assert process.poll() is None, process.communicate()
        ballast.unlink()
        time.sleep(2)
        expect(stopped(process, signal.SIGTERM), 0, "could not be saved", "; saved in")
        only_whole_ones(disk / "run")
        log = (disk / "run/metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in log]
        assert steps == sorted(steps) and len(set(steps)) >= steps[-1], (
            "lines were lost"
        )
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        ended = run(work, "disk/run", *LONG, "--resume")
        expect(ended, 2, "error: --run-dir .* is not writable")
        expect(run(work, "disk/run", "--verify"), 0, r"checkpoint \d+: good")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def two_writers(work: pathlib.Path) -> None:
    first = running(work, "two", *LONG)
    name = rf"another run \(.*, process {first.pid}, since"
    expect(run(work, "two", *LONG, "--resume"), 2, name)
    expect(run(work, "two", *LONG), 2, "already holds a run")
    expect(stopped(first, signal.SIGTERM), 0, "; saved in")
    first = running(work, "two", *LONG, "--resume")
    first.kill()
    end([first], 60)
    again = running(work, "two", *LONG, "--resume")
    expect(stopped(again, signal.SIGINT), 0, "is taken over: that run was killed")


def signals(work: pathlib.Path) -> None:
    """At any time: saved, or ended before there was anything to save."""
    draw = random.Random(0)
    for _ in range(5):
        (process,) = launch(work, work / "signals", *LONG, "--resume")
        time.sleep(draw.uniform(0, 12))
        code, output = stopped(process, draw.choice([signal.SIGTERM, signal.SIGINT]))
        assert "Traceback" not in output, output[-2000:]
        # Python itself was still starting, or nothing was there to be saved.
        early = "| jax" not in output or (code == 130 and "interrupted" in output)
        assert early or code == 0, (code, output[-2000:])
        assert early or "; saved in" in output, output[-2000:]
    (process,) = launch(work / "cold", work / "compiling", *LONG)
    for line in process.stdout:
        if "compiling" in line:
            break
    time.sleep(0.5)
    expect(stopped(process, signal.SIGINT), 130, "interrupted before a step; nothing")
    process = running(work, "twice", *LONG)
    process.send_signal(signal.SIGSTOP)  # so that both are there at once
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        process.send_signal(number)
    ((code, output),) = end([process], 60)
    assert code in (128 + signal.SIGTERM, 128 + signal.SIGINT), (code, output[-2000:])
    assert "ended at once by a second signal" in output, output[-2000:]
    assert "Traceback" not in output, output


def corruption(work: pathlib.Path) -> None:
    """Flipped bits, cut and deleted files of the newest checkpoint or its record."""
    from examples.llama.checkpoint import Store

    expect(run(work, "corrupt", *SHORT, "--keep", "2"), 0)
    store, draw = Store(work / "corrupt"), random.Random(0)
    newest, older = store.steps()
    files = [p for p in (store.folder / str(newest)).rglob("*") if p.is_file()]
    files = [p for p in (*files, store.record_path(newest)) if p.stat().st_size]
    for number in range(300):
        path = draw.choice(files)
        data = path.read_bytes()
        changed = bytearray(data)
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        kind = ("flip", "cut", "delete")[number % 3]
        if kind == "flip":
            path.write_bytes(changed)
        elif kind == "cut":
            path.write_bytes(data[: draw.randrange(len(data))])
        else:
            path.unlink()
        assert store.newest_good()[0] == older, (kind, path)
        path.write_bytes(data)
    assert store.newest_good() == (newest, {})


class Skipped(Exception):
    """The machine does not allow the fault."""


FAULTS: dict[str, Callable[[pathlib.Path], None]] = {
    fault.__name__: fault
    for fault in (no_large_files, own_disk, two_writers, signals, corruption)
}


def main() -> int:
    failed = 0
    for name in sys.argv[1:] or FAULTS:
        work = pathlib.Path(tempfile.mkdtemp(prefix=f"{name}-"))
        started = time.monotonic()
        try:
            FAULTS[name](work)
            said = "survived"
        except Skipped as why:
            said = f"skipped: {why}"
        except AssertionError as error:
            said, failed = f"FAILED: {error}", failed + 1
        finally:
            shutil.rmtree(work, ignore_errors=True)
        print(f"{name}: {said} ({time.monotonic() - started:.0f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
