"""Measurements for the benchmarks: times of interleaved rounds, and peak memory above the memory in use before."""

import ctypes
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch


def timed(call: Callable[[], object], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds of a call."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def time_rounds(
    calls: Mapping[str, Callable[[], object]],
    device: str,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds of each call in each round; a round runs every call once."""
    seconds: dict[str, list[float]] = {method: [] for method in calls}
    for _ in range(rounds + 1):
        for method, call in calls.items():
            seconds[method].append(timed(call, device, clock))
    return {method: values[1:] for method, values in seconds.items()}  # the first round warms up


def median_ratio(times: Sequence[float], references: Sequence[float]) -> float:
    """Return the median over rounds of the ratio of two calls' times in the same round."""
    return statistics.median(time / reference for time, reference in zip(times, references, strict=True))


def anonymous_mebibytes() -> float:
    """Return the anonymous memory of this process in MiB, without pages of libraries, which the system may drop."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise SystemExit("this benchmark reads /proc and runs on Linux only")


def return_freed() -> None:
    """Give freed memory back to the system; otherwise a call would reuse it and seem to need less."""
    ctypes.CDLL(None).malloc_trim(0)


def peak_above_loaded(call: Callable[[], object]) -> float:
    """Return the peak memory of a call in MiB, above the memory in use before it, sampled every two milliseconds."""
    before = anonymous_mebibytes()
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_mebibytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return peak - before


def peak_mebibytes(call: Callable[[], object], device: str) -> float:
    """Return the peak memory of a call in MiB, above the memory in use before it: of this process, or of the GPU."""
    if device == "cpu":
        return peak_above_loaded(call)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def in_fresh_process(script: str, *arguments: str, large_blocks_mapped: bool = False) -> float:
    """Return the number that a script prints last, run with ``arguments`` in a process of its own.

    ``large_blocks_mapped`` keeps blocks of 128 KiB and more off malloc's heap, whose random fragmentation changes a
    peak by a fifth from run to run.
    """
    environment = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)} if large_blocks_mapped else {}
    command = [sys.executable, script, *arguments]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    return float(json.loads(process.stdout.splitlines()[-1]))
