"""`end_at_once` ends the process on a signal, with one line and without a traceback.

It needs nothing that takes time to load, so it can stand before all that does.
"""

import os
import threading
from typing import Any, NoReturn

_first = threading.Lock()


def end_at_once(number: int, frame: Any = None, why: str = "interrupted") -> NoReturn:
    """Ends as a shell says it of a signal; nothing waits for a save."""
    del frame
    _first.acquire()  # never released: who comes second waits for the end
    # Past Python's files, one of which may just be in use by the main thread.
    os.write(2, f"\n{why}\n".encode())
    os._exit(128 + number)
