"""`storm` kills the trainer again and again, and looks whether anything was lost.

`python -m tests.storm --kills 100`: in each series of kills one method trains with one
`--keep`; every fifth runs as two processes on a mesh, of which one is killed. At the
end of a series the run may finish, and all bits of its last checkpoint and of its log
are compared with those of a run that nobody disturbed. Every start must go on, from at
most two saves before the last logged step: one may have been under way.

A series whose result stands in the file `results.jsonl` of the folder is not run again.
"""

import argparse
import json
import math
import pathlib
import random
import re
import shutil
import sys
import time
from typing import Any

from tests.runs import EVERY, end, fingerprint, last_step, launch

# One of every kind of state.
METHODS = (
    "galore galore_8bit q_galore subtrack ldadam apollo gwt online_subspace_descent "
    "adamw_8bit sumo"
).split()
PER_SERIES = 5
PATIENCE = 300.0


def settings(method: str, processes: int) -> list[str]:
    # Two processes on a small machine take a second for a step.
    return ["--optimizer", method, "--steps", "200" if processes == 1 else "40"]


def reference(work: pathlib.Path, method: str, processes: int) -> str:
    """The fingerprint of a run that nobody disturbs."""
    run_dir = work / f"whole-{method}-{processes}"
    if not (run_dir / "loss.png").exists():
        shutil.rmtree(run_dir, ignore_errors=True)
        flags = settings(method, processes)
        ended = end(launch(work, run_dir, *flags, processes=processes), PATIENCE)
        assert all(code == 0 for code, _ in ended), ended
    return fingerprint(run_dir)


def wait(draw: random.Random, run_dir: pathlib.Path, started: list) -> None:
    """Until a moment of the draw: at any time of a start, or while it trains."""
    if draw.random() < 0.25:
        time.sleep(draw.uniform(0, 8))
        return
    log = run_dir / "metrics.jsonl"
    before = log.stat().st_mtime_ns if log.exists() else 0
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and all(p.poll() is None for p in started):
        if log.exists() and log.stat().st_mtime_ns != before:
            break
        time.sleep(0.02)
    time.sleep(draw.uniform(0, 2))


def series(work: pathlib.Path, number: int, kills: int, seed: int) -> dict[str, Any]:
    """Some kills of one run, and what came of it."""
    draw = random.Random(f"{seed}-{number}")
    method, keep = METHODS[number % len(METHODS)], 1 + number % 3
    processes = 2 if number % 5 == 4 else 1
    result = {"series": number, "method": method, "keep": keep, "seed": seed}
    result |= {"processes": processes, "kills": 0, "most_lost": 0, "wrong": []}
    expected = reference(work, method, processes)
    run_dir = work / f"series-{number}"
    shutil.rmtree(run_dir, ignore_errors=True)
    flags = [*settings(method, processes), "--keep", str(keep), "--resume"]
    while True:
        before = last_step(run_dir)
        started = launch(work, run_dir, *flags, processes=processes)
        last = result["kills"] == kills
        if not last:
            wait(draw, run_dir, started)
            victim = draw.choice(started)
            result["kills"] += victim.poll() is None
            victim.kill()
        # The others end when they miss it, or are ended: of a pod, all are lost.
        ended = end(started, PATIENCE if last else 10)
        output = "".join(text for _, text in ended)
        found = re.search(r"going on from step (\d+)", output)
        start = int(found[1]) if found else 0
        if found or "compiling" in output:
            result["most_lost"] = max(result["most_lost"], before - start)
        complete = all(code == 0 for code, _ in ended)
        if (last and not complete) or (processes == 1 and "Traceback" in output):
            result["wrong"].append(output[-2000:])
        elif complete and fingerprint(run_dir) != expected:
            result["wrong"].append("other bits than those of an undisturbed run")
        if last:
            if result["most_lost"] > 2 * EVERY:
                result["wrong"].append("more steps were lost than two saves have")
            shutil.rmtree(run_dir)
            return result
        if complete:  # it was faster than its kill: once more from the start
            shutil.rmtree(run_dir)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, default="runs/storm")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of series")
    options = parser.parse_args()
    work = options.folder.absolute()
    work.mkdir(parents=True, exist_ok=True)
    log = work / "results.jsonl"
    results = (
        [json.loads(x) for x in log.read_text().splitlines()] if log.exists() else []
    )
    results = [result for result in results if result["seed"] == options.seed]
    for number in options.only or range(math.ceil(options.kills / PER_SERIES)):
        if number in {result["series"] for result in results}:
            continue
        rest = options.kills - number * PER_SERIES
        kills = min(PER_SERIES, options.kills if options.only else rest)
        results.append(series(work, number, kills, options.seed))
        with log.open("a") as file:
            file.write(json.dumps(results[-1]) + "\n")
        print(results[-1], flush=True)
    wrong = [result for result in results if result["wrong"]]
    kills = sum(result["kills"] for result in results)
    print(f"{kills} kills in {len(results)} series: {len(wrong)} series went wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
