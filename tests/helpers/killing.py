"""Kill a call at each of its file events, call it again, and tell what is there; run as a script in its own process.

A child is forked for each event. An audit hook ends it without any clean-up, as SIGKILL would: just before the event,
or just after a file was opened, when it is still empty.
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


def watch(root: Path, tell: Callable[[str, str], None]) -> None:
    """Tell of every event that changes a file below ``root``."""
    inside, busy = str(root), [False]

    def hook(event: str, given: tuple[Any, ...]) -> None:
        changes = event in CHANGES or (event == "open" and isinstance(given[2], int) and given[2] & WRITES)
        if not changes or busy[0]:
            return
        path = os.fsdecode(given[0]) if isinstance(given[0], str | bytes | os.PathLike) else ""
        # shutil.rmtree names what it deletes within an open folder.
        if path.startswith(inside) or (path and not Path(path).is_absolute() and event in ("os.remove", "os.rmdir")):
            busy[0] = True
            tell(event, path)
            busy[0] = False

    sys.addaudithook(hook)


def in_child(job: Callable[[], None]) -> int:
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
    notes = root.parent / f"{root.name}.events"

    def noted() -> None:
        file = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        watch(root, lambda event, path: os.write(file, f"{event} {path}\n".encode()) and None)
        job()

    assert in_child(noted) == 0
    return [tuple(line.split(" ", 1)) for line in notes.read_text().splitlines()]  # type: ignore[misc]


def killed_at(root: Path, number: int, job: Callable[[], None]) -> int:
    seen = [0]

    def count(event: str, path: str) -> None:
        seen[0] += 1
        if seen[0] == number + 1:
            if event == "open" and number % 2 and not Path(path).exists():
                Path(path).touch()  # opened, and nothing written yet
            os._exit(KILLED)

    def child() -> None:
        watch(root, count)
        job()

    return in_child(child)


def contents(root: Path) -> dict[str, str]:
    """Every file, and a digest of what must be the same: times and memory are not."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_dir():
            found[name] = "folder"
            continue
        data = path.read_bytes()
        if path.name in ("result.json", "cell.json", "log.jsonl", "comparison.json"):
            data = repr(_timeless([json.loads(line) for line in _documents(data, path)])).encode()
        found[name] = hashlib.sha256(data).hexdigest()[:12]
    return found


def _documents(data: bytes, path: Path) -> list[str]:
    text = data.decode()
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        # The engine's last row counts what it trained since the run went on.
        odd = ("seconds", "peak_mib", "runtime", "per_second", "total_flos", "train_loss")
        return {key: _timeless(one) for key, one in sorted(value.items()) if not any(part in key for part in odd)}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


def sample(events: list[tuple[str, str]], every: int) -> list[int]:
    """Every rename, and each so-many-th of the others; all of them if VITSCOPE_KILL_ANYWHERE is set."""
    every = 1 if os.environ.get("VITSCOPE_KILL_ANYWHERE") else every
    return [at for at, (event, _) in enumerate(events) if event in ("os.rename", "os.link") or at % every == 0]


def campaign(
    root: Path,
    prepare: Callable[[Path], None],
    job: Callable[[Path], None],
    every: int,
    check: Callable[[Path], None] = lambda _: None,
) -> dict[str, Any]:
    def start(name: str) -> Path:
        place = root / name
        place.mkdir(parents=True)
        prepare(place)
        return place

    whole = start("whole")
    events = events_of(whole, lambda: job(whole))
    wanted, wrong, kills = contents(whole), [], 0
    for number in sample(events, every):
        place = start(f"kill-{number}")
        kills += killed_at(place, number, lambda: job(place)) == KILLED  # noqa: B023
        what = f"event {number} ({' '.join(events[number])})"
        if in_child(lambda: check(place)):  # noqa: B023
            wrong.append(f"{what}: what stood there is not whole")
        if in_child(lambda: job(place)):  # noqa: B023
            wrong.append(f"{what}: the same call is refused")
        elif (now := contents(place)) != wanted:
            odd = [name for name in {*now, *wanted} if now.get(name) != wanted.get(name)]
            wrong.append(f"{what}: {sorted(odd)[:4]} differ")
        shutil.rmtree(place)
        print(what, len(wrong), wrong[-1:], file=sys.stderr, flush=True)
    return {"events": len(events), "kills": kills, "tried": len(sample(events, every)), "wrong": wrong}


def main(kind: str, root: Path) -> None:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import vitscope as vs
    from tests.helpers.coloured import coloured, small_vit
    from vitscope import files as saving
    from vitscope.tune import attention_change

    data, model = coloured(8, 6), small_vit()
    options: dict[str, Any] = {"epochs": 2, "batch_size": 8, "augment": (), "tuning": "bitfit"}

    def finetune(place: Path, **changes: Any) -> None:
        vs.finetune(model, data, out=place / "run", **(options | changes))

    def whole_run(place: Path) -> None:
        vs.load(place / "run")
        result = json.loads((place / "run" / "result.json").read_text())
        assert result["recipe"] == json.loads((place / "run" / "run.json").read_text())["recipe"]

    gc.collect()
    gc.freeze()  # a collection in a child would copy every page
    if kind == "finetune":
        found = campaign(root, lambda _: None, finetune, 15)
    elif kind.startswith("overwrite"):
        if kind.endswith("renames"):
            saving._exchange = lambda *_: False
        old = root / "old"
        assert in_child(lambda: finetune(old, seed=1)) == 0

        def with_old(place: Path) -> None:
            shutil.copytree(old, place, dirs_exist_ok=True)

        def replace(place: Path) -> None:
            finetune(place, overwrite=True)

        check = whole_run if kind == "overwrite" else (lambda _: None)
        found = campaign(root / "runs", with_old, replace, 30, check)
    else:
        attention_change._mean_areas = lambda *_: dict.fromkeys(attention_change.AREAS, 0.5)

        def compare(place: Path) -> None:
            vs.compare(data, [model], out=place / "out", tunings=["head"], seeds=1, epochs=1, batch_size=8, augment=())

        found = campaign(root, lambda _: None, compare, 7)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
