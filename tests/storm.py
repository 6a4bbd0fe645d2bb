"""`storm` kills the trainer again and again, and looks whether anything was lost.

`python -m tests.storm --kills 100`: in each series of kills one method trains with one
`--keep`; some run as two processes on a mesh, of which one is killed. At the end of a
series the run may finish, and all bits of its last checkpoint and of its log
are compared with those of a run that nobody disturbed. Every start must go on, from at
most two saves before the last logged step: one may have been under way.

Every kill, with its moment, and every series is a line in `results.jsonl` of the folder
as soon as it is over. A series that has one is not run again, so a long storm goes on
where it was left. `--report` prints the summary of what is there.
"""

import argparse
import collections
import json
import math
import pathlib
import random
import re
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

from tests.runs import EVERY, end, fingerprint, last_step, launch

# One of every kind of state.
METHODS = (
    "galore galore_8bit q_galore apollo ldadam subtrack online_subspace_descent gwt "
    "adamw_8bit sumo even_muon"
).split()
PER_SERIES = 5
PATIENCE = 900.0
TRIES = 3
Line = dict[str, Any]


def settings(method: str, processes: int) -> list[str]:
    # Two processes on a small machine take a second for a step.
    return ["--optimizer", method, "--steps", "200" if processes == 1 else "40"]


def reference(work: pathlib.Path, method: str, processes: int) -> str:
    """The fingerprint of a run that nobody disturbs."""
    run_dir = work / f"whole-{method}-{processes}"
    noted = run_dir.with_suffix(".txt")
    if noted.exists():
        return noted.read_text()
    flags = [*settings(method, processes), "--resume"]
    for _ in range(TRIES):
        shutil.rmtree(run_dir, ignore_errors=True)
        ended = end(launch(work, run_dir, *flags, processes=processes), PATIENCE)
        if not lost_each_other(ended):
            break
    assert all(code == 0 for code, _ in ended), ended
    noted.write_text(found := fingerprint(run_dir))
    return found


def lost_each_other(ended: list[tuple[int, str]]) -> bool:
    """Whether processes missed Gloo's 30 seconds, as when a busy machine compiles."""
    return any(code and "Gloo context initialization" in text for code, text in ended)


def wait(
    draw: random.Random, run_dir: pathlib.Path, started: list, usual: float
) -> float:
    """Until a moment of the draw: at any time of a start, or while it trains.

    Takes and returns the seconds that a start takes.
    """
    if draw.random() < 0.25:
        time.sleep(draw.uniform(0, usual))
        return usual
    log = run_dir / "metrics.jsonl"
    before = log.stat().st_mtime_ns if log.exists() else 0
    begin = time.monotonic()
    while time.monotonic() < begin + PATIENCE and all(
        p.poll() is None for p in started
    ):
        if log.exists() and log.stat().st_mtime_ns != before:
            break
        time.sleep(0.02)
    usual = time.monotonic() - begin
    time.sleep(draw.uniform(0, 2))
    return usual


def moment(run_dir: pathlib.Path, output: str) -> str:
    """What a run was doing when it was killed, from what it left and had said."""
    if list((run_dir / "records").glob("*.saving")):
        return "in a save"
    if "| jax" not in output:
        return "before JAX"
    if "compiling" not in output:
        return "reading or restoring"
    if "loss" not in output.rsplit("compiling", 1)[1]:  # the bar shows that of a step
        return "in the first step"
    return "between saves"


def litter(run_dir: pathlib.Path, keep: int) -> list[str]:
    """What a finished run should not have left behind."""
    folders = [path.name for path in (run_dir / "checkpoints").iterdir()]
    files = [path.name for path in (run_dir / "records").iterdir()]
    left = [name for name in folders if not name.isdigit()]
    left += [name for name in files if name.removesuffix(".json") not in folders]
    left += [path.name for path in run_dir.glob("*.partial")]
    left += [path.name for path in run_dir.glob("damaged/*")]
    return left if left or len(folders) <= keep else folders


def series(
    work: pathlib.Path,
    number: int,
    kills: int,
    seed: int,
    note: Callable[[Line], Any] = print,
) -> Line:
    """Some kills of one run, and what came of it; each kill is noted when it is over.

    The times are drawn from seed and number. What the machine makes of them is its own.
    """
    draw = random.Random(f"{seed}-{number}")
    method, keep = METHODS[number % len(METHODS)], 1 + number % 3
    # 7 has no factor in common with the methods and with 3: all pairs will come.
    processes = 2 if number % 7 == 3 else 1
    which = {"seed": seed, "series": number}
    result = which | {"method": method, "keep": keep, "processes": processes}
    result |= {"kills": 0, "most_lost": 0, "wrong": []}
    expected = reference(work, method, processes)
    run_dir = work / f"series-{number}"
    shutil.rmtree(run_dir, ignore_errors=True)
    flags = [*settings(method, processes), "--keep", str(keep), "--resume"]
    usual, tries = 8.0, TRIES
    while True:
        before = last_step(run_dir)
        started = launch(work, run_dir, *flags, processes=processes)
        last, killed = result["kills"] == kills, False
        if not last:
            usual = wait(draw, run_dir, started, usual)
            victim = draw.choice(started)
            killed = victim.poll() is None
            victim.kill()
        # The others end when they miss it, or are ended: of a pod, all are lost.
        ended = end(started, PATIENCE if last else 10)
        output = "".join(text for _, text in ended)
        found = re.search(r"going on from step (\d+)", output)
        start = int(found[1]) if found else 0
        if found or "compiling" in output:
            result["most_lost"] = max(result["most_lost"], before - start)
        if last and lost_each_other(ended) and (tries := tries - 1):
            continue
        complete = all(code == 0 for code, _ in ended)
        if killed:
            result["kills"] += 1
            step = last_step(run_dir)
            note(which | {"moment": moment(run_dir, output), "step": step})
        if (last and not complete) or (processes == 1 and "Traceback" in output):
            result["wrong"].append(output[-2000:])
        elif complete and fingerprint(run_dir) != expected:
            result["wrong"].append("other bits than those of an undisturbed run")
        elif complete and (left := litter(run_dir, keep)):
            result["wrong"].append(f"left behind: {left}")
        if last:
            if result["most_lost"] > 2 * EVERY:
                result["wrong"].append("more steps were lost than two saves have")
            if not result["wrong"]:
                shutil.rmtree(run_dir)
            note(result)
            return result
        if complete:  # it was faster than its kill: once more from the start
            shutil.rmtree(run_dir)


def lines(log: pathlib.Path, seed: int) -> list[Line]:
    """What was noted of a storm."""
    if not log.exists():
        return []
    noted = map(json.loads, log.read_text().splitlines())
    return [line for line in noted if line["seed"] == seed]


def report(noted: list[Line]) -> int:
    """Prints the summary; 0 if every series ended with the bits that it should."""
    over = [line for line in noted if "kills" in line]
    moments: collections.Counter[str] = collections.Counter()
    for line in over:
        ours = [x for x in noted if x["series"] == line["series"] and "moment" in x]
        # Those before belong to an attempt that was broken off.
        moments.update(x["moment"] for x in ours[-line["kills"] :])
    for name in ("processes", "keep", "method"):
        parts = collections.Counter()
        for line in over:
            parts[line[name]] += line["kills"]
        print(f"kills by {name}: {', '.join(f'{k} {v}' for k, v in parts.items())}")
    print(f"kills by moment: {', '.join(f'{k} {v}' for k, v in moments.most_common())}")
    wrong = [line for line in over if line["wrong"]]
    for line in wrong:
        print(f"WRONG: {line}")
    print(
        f"{sum(line['kills'] for line in over)} kills in {len(over)} series; "
        f"{len(over) - len(wrong)} of {len(over)} ends bit-equal, at most "
        f"{max((line['most_lost'] for line in over), default=0)} steps done again"
    )
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, default="runs/storm")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of series")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    work = options.folder.absolute()
    work.mkdir(parents=True, exist_ok=True)
    log = work / "results.jsonl"

    def note(line: Line) -> None:
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)

    done = {line["series"] for line in lines(log, options.seed) if "kills" in line}
    numbers = options.only or range(math.ceil(options.kills / PER_SERIES))
    for number in () if options.report else numbers:
        if number in done:
            continue
        rest = options.kills - number * PER_SERIES
        kills = min(PER_SERIES, options.kills if options.only else rest)
        series(work, number, kills, options.seed, note)
    return report(lines(log, options.seed))


if __name__ == "__main__":
    sys.exit(main())
