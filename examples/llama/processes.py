"""`start_processes` joins the processes of one run; what they agree on, and how they
stop.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from examples.llama.config import UsageError
from examples.llama.interrupt import end_at_once
from examples.llama.run_folder import brief

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
WAIT = 300  # seconds until the others must be there


def start_processes(distributed: bool) -> None:
    """Joins the other processes, before anything else is done with JAX.

    They are those that the environment names (`NAMES`), or with `--distributed` those
    that JAX finds itself: on TPU pods, Slurm and GKE.

    Raises:
        UsageError: the environment names only a part, nothing is found, or nobody
            answers at the coordinator's address.
    """
    given = {name: os.environ[name] for name in NAMES if os.environ.get(name)}
    if (not given and not distributed) or jax.distributed.is_initialized():
        return
    if given and len(given) < len(NAMES):
        missing = [name for name in NAMES if name not in given]
        raise UsageError(
            f"{', '.join(given)} is set and {', '.join(missing)} is not: set all of "
            f"{', '.join(NAMES)}, or none and --distributed on a pod or under Slurm"
        )
    try:
        if given:
            address, count, index = (given[name] for name in NAMES)
            _find_coordinator(address, int(count), int(index))
            jax.distributed.initialize(
                address, int(count), int(index), initialization_timeout=WAIT
            )
        else:
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"the processes of the run could not be joined ({error}); set "
            f"{', '.join(NAMES)}"
        ) from error


def _find_coordinator(address: str, count: int, index: int) -> None:
    """Waits for process 0 to listen; JAX itself would abort this process after `WAIT`.

    Raises:
        UsageError: the address is none, or nobody listens there.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UsageError(
            f"{NAMES[0]} must be the host and a port of process 0, such as "
            f"10.0.0.1:8476; got {address!r}"
        )
    print(
        f"process {index} of {count} joins the others at {address}, for up to {WAIT} s",
        file=sys.stderr,
        flush=True,
    )
    until = time.monotonic() + WAIT
    # Process 0 is the one that listens, so only the others wait.
    while index:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise UsageError(
                    f"nobody listens at {address} ({error}), where process 0 should: "
                    f"check that it runs, with the same {NAMES[0]}, that the name is "
                    "that of its host, and that no firewall closes the port"
                ) from error
        time.sleep(0.5)


def is_first() -> bool:
    """Whether this process writes what all of them know."""
    return jax.process_index() == 0


@contextlib.contextmanager
def only_first_prints() -> Iterator[None]:
    """The standard output of all others is dropped; their errors are not."""
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def any_of(flag: Callable[[], bool]) -> Callable[[], bool]:
    """The same answer in all processes: whether it is true in one. All must ask."""
    if jax.process_count() == 1:
        return flag
    return lambda: bool(multihost_utils.process_allgather(np.array(flag())).any())


def found_by_first(find: Callable[[], Any]) -> Any:
    """What the first process finds (anything JSON holds), in all of them.

    Raises:
        UsageError: the first process' own.
    """
    if jax.process_count() == 1:
        return find()
    text = b""
    if is_first():
        try:
            text = json.dumps({"found": find()}).encode()
        except (UsageError, OSError) as error:
            # An error is sent as well, or the others would wait for an answer.
            line = str(error) if isinstance(error, UsageError) else brief(error)
            text = json.dumps({"error": line}).encode()
    # All processes must bring arrays of one shape, so the length goes ahead.
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    data = np.frombuffer(text.ljust(length), np.uint8)
    answer = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(data))))
    if "error" in answer:
        raise UsageError(answer["error"])
    return answer["found"]


@contextlib.contextmanager
def stop_on_signals(
    unsaved: Callable[[], bool] = lambda: True,
) -> Iterator[Callable[[], bool]]:
    """SIGTERM and Ctrl-C set a flag; a second one ends the process at once.

    So does a first Ctrl-C while nothing is `unsaved`: who sits before a compilation of
    minutes need not wait for it.
    """
    asked = threading.Event()

    def end_if_due(number: int, before: int) -> None:
        if before:
            end_at_once(number, why="ended at once by a second signal; nothing more "
                        "is saved")  # fmt: skip
        if number == signal.SIGINT and not unsaved():
            end_at_once(number, why="interrupted before a step; nothing is lost")

    def note(number: int, frame: Any) -> None:
        del frame
        end_if_due(number, asked.is_set())
        asked.set()

    def watch(reader: int) -> None:
        # Python's handlers wait until the main thread is back from a compilation or a
        # device; what the system writes here is seen at once.
        seen = 0
        while number := os.read(reader, 1):
            if number[0] in (signal.SIGTERM, signal.SIGINT):
                end_if_due(number[0], seen)
                seen += 1

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # Python lets only the main thread handle signals
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watcher = threading.Thread(target=watch, args=(reader,), daemon=True)
    watcher.start()
    before_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before_fd)
        os.close(writer)  # which ends the watcher
        watcher.join()
        os.close(reader)
