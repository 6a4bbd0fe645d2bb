"""Which folder a run lives in, and how it is asked to stop."""

import contextlib
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from examples.llama.checkpoint import Store
from examples.llama.config import TrainConfig, UsageError


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


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """SIGTERM and Ctrl-C set a flag; the same signal a second time interrupts."""
    asked = threading.Event()

    def note(number: int, frame: Any) -> None:
        del frame
        asked.set()
        signal.signal(number, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # Python lets only the main thread handle signals
        return
    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
