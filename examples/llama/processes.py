"""Several processes of one run: how they start, and what they must agree on."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from examples.llama.config import UsageError

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start_processes(distributed: bool) -> None:
    """Joins the other processes, before anything else is done with JAX.

    They are those that the environment names (`NAMES`), or with `--distributed` those
    that JAX finds itself: on TPU pods, Slurm and GKE.

    Raises:
        UsageError: the environment names only a part, or nothing is found.
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
            address, count, index = given.values()
            jax.distributed.initialize(address, int(count), int(index))
        else:
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"the processes of the run could not be joined ({error}); set "
            f"{', '.join(NAMES)}"
        ) from error


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
        except UsageError as error:
            text = json.dumps({"error": str(error)}).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    data = np.frombuffer(text.ljust(length), np.uint8)
    answer = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(data))))
    if "error" in answer:
        raise UsageError(answer["error"])
    return answer["found"]
