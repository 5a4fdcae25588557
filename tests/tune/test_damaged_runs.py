"""Files of a run that are damaged are told of in one line that names them; two runs never mix."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import vitscope as vs
from tests.helpers.coloured import coloured, small_vit
from tests.helpers.every_model import same, weights
from vitscope.errors import CallError, OutputExistsError, SaveError, VitscopeError, WorkError
from vitscope.files import atomic_write, hidden_name, is_temporary
from vitscope.tune import checkpoints
from vitscope.tune.lock import locked
from vitscope.tune.run_folder import read_run

pytestmark = pytest.mark.usefixtures("little_garbage")
OPTIONS: dict[str, Any] = {"epochs": 2, "batch_size": 8, "augment": (), "tuning": "bitfit"}
DEEP = b"[" * 100_000 + b"]" * 100_000
BROKEN = {
    "list": b"[]",
    "number": b"5",
    "null": b"null",
    "object": b"{}",
    "deep": DEEP,
    "latin": b'{"caf\xe9": 1}',
    "empty": b"",
    "cut": b'{"model": "x", ',
}


class BrokenOffError(Exception):
    pass


def run(out: Path, **options: Any) -> vs.Tuned:
    return vs.finetune(small_vit(), coloured(), out=out, **(OPTIONS | options))


def broken_off(out: Path) -> Path:
    def stop(now: Mapping[str, float]) -> None:
        if now["step"] == 4:
            raise BrokenOffError

    with pytest.raises(BrokenOffError):
        run(out, progress=stop)
    (kept,) = checkpoints.checkpoints(out / "checkpoints")
    return kept


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return broken_off(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("runs") / "run").folder


def refused(path: Path, damaged: bytes | None, out: Path, **options: Any) -> str:
    """The line of the refusal; the file is whole again afterwards."""
    whole = path.read_bytes()
    path.unlink()
    try:
        if damaged is not None:
            path.write_bytes(damaged)
        with pytest.raises(VitscopeError) as error:
            run(out, **options)
    finally:
        path.write_bytes(whole)
    story = str(error.value)
    assert "\n" not in story
    assert str(path) in story
    assert "delete" in story
    return story


@pytest.mark.parametrize("damage", BROKEN)
@pytest.mark.parametrize("file", ["trainer_state.json", "state.json", "checksums.json"])
def test_damaged_json_of_a_checkpoint(file: str, damage: str, unfinished: Path) -> None:
    refused(unfinished / file, BROKEN[damage], unfinished.parents[1])


@pytest.mark.parametrize(
    "file",
    ["trained.safetensors", "optimizer.safetensors", "random.safetensors", "state.json", "trainer_state.json"],
)
def test_one_flipped_bit_of_a_checkpoint(file: str, unfinished: Path) -> None:
    whole = bytearray((unfinished / file).read_bytes())
    at = whole.rindex(b"0") if file.endswith(".json") else len(whole) - 7
    whole[at] ^= 1
    story = refused(unfinished / file, bytes(whole), unfinished.parents[1])
    assert "its checksum is not the one in checksums.json" in story


def test_a_checkpoint_whose_folder_is_deleted_as_advised_begins_anew(tmp_path: Path, finished: Path) -> None:
    kept = broken_off(tmp_path / "run")
    assert kept.parents[1] == tmp_path / "run"
    for file in kept.iterdir():
        file.unlink()
    kept.rmdir()
    assert same(weights(run(tmp_path / "run").model), weights(vs.load(finished)))


@pytest.mark.parametrize("damage", [name for name in BROKEN if name != "object"])
def test_a_damaged_run_json(damage: str, finished: Path) -> None:
    story = refused(finished / "run.json", BROKEN[damage], finished)
    assert "cannot be read as a run" in story


@pytest.mark.parametrize("damage", [*BROKEN, "said", "truth", "confusion", "interval"])
def test_a_damaged_result(damage: str, finished: Path) -> None:
    damaged = BROKEN.get(damage)
    if damaged is None:
        about = json.loads((finished / "result.json").read_text(encoding="utf-8"))
        damaged = json.dumps({**about, damage: [["x"]]}).encode()
    assert "holds no finished run" in refused(finished / "result.json", damaged, finished)


def test_a_run_without_a_result_is_no_finished_run(tmp_path: Path) -> None:
    with pytest.raises(CallError, match="holds no finished run"):
        read_run(tmp_path)


@pytest.mark.parametrize("damage", BROKEN)
def test_a_damaged_log_is_written_anew(damage: str, tmp_path: Path, finished: Path) -> None:
    broken_off(tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    log.write_bytes(BROKEN[damage])
    run(tmp_path / "run")
    steps = [json.loads(line)["step"] for line in log.read_text(encoding="utf-8").splitlines()]
    assert steps == [
        json.loads(line)["step"] for line in (finished / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_only_leftovers_in_a_folder_are_no_other_content(tmp_path: Path) -> None:
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    with atomic_write(tmp_path / "run" / "run.json") as beside:
        beside.write_text("")
        name = beside.name
    dead = name.replace(f"-{os.getpid():x}-", f"-{int(process.stdout):x}-")
    assert is_temporary(dead)
    (tmp_path / "run" / "run.json").rename(tmp_path / "run" / dead)
    run(tmp_path / "run")
    assert sorted(one.name for one in (tmp_path / "run").iterdir()) == ["log.jsonl", "model", "result.json", "run.json"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".mine").touch()
    with pytest.raises(OutputExistsError, match="holds something else than a run"):
        run(tmp_path / "other")


def test_what_others_are_writing_is_left_alone(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.txt") as first:
        first.write_text("a")
        with atomic_write(tmp_path / "b.txt") as second:
            second.write_text("b")
            assert first.exists()
        parent = first.with_name(first.name.replace(f"-{os.getpid():x}-", f"-{os.getppid():x}-"))
        parent.touch()
        with atomic_write(tmp_path / "c.txt") as third:
            third.write_text("c")
    assert sorted(tmp_path.iterdir()) == sorted([parent, *(tmp_path / f"{one}.txt" for one in "abc")])


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_file_that_another_process_wrote_meanwhile_is_not_replaced(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", none)
    path = tmp_path / "map.png"

    def write() -> None:
        with atomic_write(path, overwrite=False) as beside:
            beside.write_text("second")
            path.write_text("first")

    with pytest.raises(OutputExistsError, match="already exists: choose another name or allow overwriting"):
        write()
    assert path.read_text() == "first"
    path.unlink()
    with atomic_write(path, overwrite=False) as beside:
        beside.write_text("alone")
    assert path.read_text() == "alone"
    assert list(tmp_path.iterdir()) == [path]


def test_two_runs_in_one_folder_the_second_is_told_who_works_there(tmp_path: Path, finished: Path) -> None:
    stories: list[str] = []

    def second(now: Mapping[str, float]) -> None:
        if now["step"] == 2 and not stories:
            with pytest.raises(WorkError, match=r"another run works on .*run \(process \d+\): wait") as error:
                vs.finetune(small_vit(), coloured(), out=tmp_path / "run", **OPTIONS)
            stories.append(str(error.value))

    tuned = run(tmp_path / "run", progress=second)
    assert str(os.getpid()) in stories[0]
    assert same(weights(tuned.model), weights(vs.load(finished)))
    assert [one.name for one in tmp_path.iterdir()] == ["run"]


def test_the_lock_of_a_dead_process_locks_nobody_out(tmp_path: Path) -> None:
    hidden_name(tmp_path / "run", "lock").write_text("1")
    with locked(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_holds_between_threads(tmp_path: Path) -> None:
    refusals: list[bool] = []

    def other() -> None:
        try:
            with locked(tmp_path / "run"):
                refusals.append(False)
        except WorkError:
            refusals.append(True)

    with locked(tmp_path / "run"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    other()
    assert refusals == [True, False]


def test_a_lock_below_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises((CallError, SaveError), match="is a file, or lies under one"), locked(tmp_path / "file" / "run"):
        pass
