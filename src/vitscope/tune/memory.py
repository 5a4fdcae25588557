"""Peak memory of a block of code, in addition to the memory that was used before it."""

import ctypes
import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

INTERVAL_SECONDS = 0.02


class Peak:
    """The result of :func:`peak_memory`.

    Attributes:
        mib: peak memory in MiB, of the GPU if the work ran there, else of this process.
    """

    mib: float = 0.0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Yield an object that holds the peak memory of the block after the block ends."""
    peak = Peak()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.mib = (torch.cuda.max_memory_allocated(device) - before) / 2**20
        return
    _release_freed_memory()
    process, done = psutil.Process(), threading.Event()
    before = highest = process.memory_info().rss

    def watch() -> None:
        nonlocal highest
        while not done.wait(INTERVAL_SECONDS):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak.mib = (max(highest, process.memory_info().rss) - before) / 2**20


def _release_freed_memory() -> None:
    """Return freed memory to the system, so that it does not hide the memory that this work uses."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not every C library has it
        if trim is not None:
            trim(0)
