"""Kill a call at each of its file events, repeat the call, and compare the files; run as a script in its own process.

A child is forked for each event. An audit hook ends it without any clean-up, as SIGKILL would: just before the event,
or just after a file was opened, while it is still empty.
"""

import gc
import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

KILLED, FAILED = 77, 78
CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch(root: Path, report: Callable[[str, str], None]) -> None:
    """Report every event that changes a file below ``root``."""
    inside, busy = str(root), [False]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES)
        if not changes or busy[0]:
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
        # shutil.rmtree names files relative to an open folder.
        if path.startswith(inside) or (path and not Path(path).is_absolute() and event in ("os.remove", "os.rmdir")):
            busy[0] = True
            report(event, path)
            busy[0] = False

    sys.addaudithook(hook)


def in_child(job: Callable[[], None]) -> int:
    """Run a job in a forked child and return its exit code."""
    process = os.fork()
    if process == 0:
        try:
            job()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(FAILED)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def events_of(root: Path, job: Callable[[], None]) -> list[tuple[str, str]]:
    """Return the file events of a job, each with its path."""
    log = root.parent / f"{root.name}.events"

    def logged_job() -> None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        watch(root, lambda event, path: os.write(file, f"{event} {path}\n".encode()) and None)
        job()

    assert in_child(logged_job) == 0
    return [tuple(line.split(" ", 1)) for line in log.read_text().splitlines()]  # type: ignore[misc]


def killed_at(root: Path, number: int, job: Callable[[], None]) -> int:
    """Run a job in a child that is killed at the event of this number, and return its exit code."""
    seen = [0]

    def count(event: str, path: str) -> None:
        seen[0] += 1
        if seen[0] == number + 1:
            if event == "open" and number % 2 and not Path(path).exists():
                Path(path).touch()  # opened, but nothing is written yet
            os._exit(KILLED)

    def child() -> None:
        watch(root, count)
        job()

    return in_child(child)


def contents(root: Path) -> dict[str, str]:
    """Return a digest of every file without the entries that vary between runs, such as time and memory."""
    digests = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_dir():
            digests[name] = "folder"
            continue
        data = path.read_bytes()
        if path.name in ("result.json", "cell.json", "log.jsonl", "comparison.json"):
            data = repr(_timeless([json.loads(line) for line in _documents(data, path)])).encode()
        digests[name] = hashlib.sha256(data).hexdigest()[:12]
    return digests


def _documents(data: bytes, path: Path) -> list[str]:
    text = data.decode()
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        # The engine's last row counts from the moment the run was resumed.
        varying = ("seconds", "peak_mib", "runtime", "per_second", "total_flos", "train_loss")
        return {
            key: _timeless(entry) for key, entry in sorted(value.items()) if not any(name in key for name in varying)
        }
    return [_timeless(entry) for entry in value] if isinstance(value, list) else value


def sample(events: list[tuple[str, str]], every: int) -> list[int]:
    """Return the indices of all renames and of each ``every``-th other event; all if VITSCOPE_KILL_ANYWHERE is set."""
    every = 1 if os.environ.get("VITSCOPE_KILL_ANYWHERE") else every
    return [i for i, (event, _) in enumerate(events) if event in ("os.rename", "os.link") or i % every == 0]


def campaign(
    root: Path,
    prepare: Callable[[Path], None],
    job: Callable[[Path], None],
    every: int,
    check: Callable[[Path], None] = lambda _: None,
) -> dict[str, Any]:
    """Kill a job at a sample of its events and report every run that differs from an undisturbed one."""

    def start(name: str) -> Path:
        folder = root / name
        folder.mkdir(parents=True)
        prepare(folder)
        return folder

    undisturbed = start("whole")
    events = events_of(undisturbed, lambda: job(undisturbed))
    expected, wrong, kills = contents(undisturbed), [], 0
    for number in sample(events, every):
        folder = start(f"kill-{number}")
        kills += killed_at(folder, number, lambda: job(folder)) == KILLED  # noqa: B023
        point = f"event {number} ({' '.join(events[number])})"
        if in_child(lambda: check(folder)):  # noqa: B023
            wrong.append(f"{point}: the older result is damaged")
        if in_child(lambda: job(folder)):  # noqa: B023
            wrong.append(f"{point}: the same call is refused")
        elif (actual := contents(folder)) != expected:
            differing = [name for name in {*actual, *expected} if actual.get(name) != expected.get(name)]
            wrong.append(f"{point}: {sorted(differing)[:4]} differ")
        shutil.rmtree(folder)
        print(point, len(wrong), wrong[-1:], file=sys.stderr, flush=True)
    return {"events": len(events), "kills": kills, "tried": len(sample(events, every)), "wrong": wrong}


def main(kind: str, root: Path) -> None:
    """Run the campaign of this kind below ``root`` and print its report as JSON."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import vitscope as vs
    from tests.helpers.coloured import coloured, small_vit
    from vitscope import files
    from vitscope.tune import attention_change

    data, model = coloured(8, 6), small_vit()
    options: dict[str, Any] = {"epochs": 2, "batch_size": 8, "augment": (), "tuning": "bitfit"}

    def finetune(place: Path, **changes: Any) -> None:
        vs.finetune(model, data, out=place / "run", **(options | changes))

    def check_run(place: Path) -> None:
        vs.load(place / "run")
        result = json.loads((place / "run" / "result.json").read_text())
        assert result["recipe"] == json.loads((place / "run" / "run.json").read_text())["recipe"]

    gc.collect()
    gc.freeze()  # a collection in a child would copy every page
    if kind == "finetune":
        report = campaign(root, lambda _: None, finetune, 15)
    elif kind.startswith("overwrite"):
        if kind.endswith("renames"):
            files._exchange = lambda *_: False
        old = root / "old"
        assert in_child(lambda: finetune(old, seed=1)) == 0

        def with_old(place: Path) -> None:
            shutil.copytree(old, place, dirs_exist_ok=True)

        def replace(place: Path) -> None:
            finetune(place, overwrite=True)

        check = check_run if kind == "overwrite" else (lambda _: None)
        report = campaign(root / "runs", with_old, replace, 30, check)
    else:
        attention_change._mean_areas = lambda *_: dict.fromkeys(attention_change.AREAS, 0.5)

        def compare(place: Path) -> None:
            vs.compare(data, [model], out=place / "out", tunings=["head"], seeds=1, epochs=1, batch_size=8, augment=())

        report = campaign(root, lambda _: None, compare, 7)
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
