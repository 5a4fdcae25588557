"""Damaged files of a run are reported in one line that names them; two runs never mix."""

import json
import os
import subprocess
import sys
import threading
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


class InterruptionError(Exception):
    pass


def run(out: Path, **options: Any) -> vs.Tuned:
    return vs.finetune(small_vit(), coloured(), out=out, **(OPTIONS | options))


def interrupted_checkpoint(out: Path) -> Path:
    def stop(step: vs.Progress) -> None:
        if step.completed == 4:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        run(out, progress=stop)
    (checkpoint,) = checkpoints.checkpoints(out / "checkpoints")
    return checkpoint


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return interrupted_checkpoint(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("runs") / "run").folder


def refusal(path: Path, damaged: bytes | None, out: Path, **options: Any) -> str:
    """Return the message about a damaged file, which is restored afterwards."""
    original = path.read_bytes()
    path.unlink()
    try:
        if damaged is not None:
            path.write_bytes(damaged)
        with pytest.raises(VitscopeError) as error:
            run(out, **options)
    finally:
        path.write_bytes(original)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    assert "delete" in message
    return message


@pytest.mark.slow
@pytest.mark.parametrize("damage", BROKEN)
@pytest.mark.parametrize("file", ["trainer_state.json", "state.json", "checksums.json"])
def test_damaged_json_of_a_checkpoint_is_refused(file: str, damage: str, unfinished: Path) -> None:
    refusal(unfinished / file, BROKEN[damage], unfinished.parents[1])


@pytest.mark.parametrize(
    "file",
    ["trained.safetensors", "optimizer.safetensors", "random.safetensors", "state.json", "trainer_state.json"],
)
def test_one_flipped_bit_of_a_checkpoint_is_detected(file: str, unfinished: Path) -> None:
    content = bytearray((unfinished / file).read_bytes())
    offset = content.rindex(b"0") if file.endswith(".json") else len(content) - 7
    content[offset] ^= 1
    message = refusal(unfinished / file, bytes(content), unfinished.parents[1])
    assert "its checksum is not the one in checksums.json" in message


@pytest.mark.slow
def test_a_run_starts_again_after_its_checkpoint_was_deleted_as_advised(tmp_path: Path, finished: Path) -> None:
    checkpoint = interrupted_checkpoint(tmp_path / "run")
    assert checkpoint.parents[1] == tmp_path / "run"
    for file in checkpoint.iterdir():
        file.unlink()
    checkpoint.rmdir()
    assert same(weights(run(tmp_path / "run").model), weights(vs.load(finished)))


@pytest.mark.parametrize("damage", [name for name in BROKEN if name != "object"])
def test_damaged_settings_are_refused(damage: str, finished: Path) -> None:
    assert "cannot be read as a run" in refusal(finished / "run.json", BROKEN[damage], finished)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [*BROKEN, "predictions", "true_labels", "confusion", "interval"])
def test_a_damaged_result_is_refused(damage: str, finished: Path) -> None:
    damaged = BROKEN.get(damage)
    if damaged is None:
        record = json.loads((finished / "result.json").read_text(encoding="utf-8"))
        damaged = json.dumps({**record, damage: [["x"]]}).encode()
    assert "holds no finished run" in refusal(finished / "result.json", damaged, finished)


def test_the_result_of_an_older_version_is_refused(finished: Path) -> None:
    record = json.loads((finished / "result.json").read_text(encoding="utf-8"))
    record |= {"said": record.pop("predictions"), "truth": record.pop("true_labels")}
    path = finished / "result.json"
    content = path.read_bytes()
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(CallError, match=r"holds the run of an older version of vitscope: delete .* and run the same"):
        read_run(finished)
    path.write_bytes(content)


def test_a_run_without_a_result_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(CallError, match="holds no finished run"):
        read_run(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("damage", BROKEN)
def test_a_damaged_log_is_written_again(damage: str, tmp_path: Path, finished: Path) -> None:
    interrupted_checkpoint(tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    log.write_bytes(BROKEN[damage])
    run(tmp_path / "run")
    steps = [json.loads(line)["step"] for line in log.read_text(encoding="utf-8").splitlines()]
    assert steps == [
        json.loads(line)["step"] for line in (finished / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_a_folder_with_only_temporary_files_counts_as_empty(tmp_path: Path) -> None:
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    with atomic_write(tmp_path / "run" / "run.json") as temporary:
        temporary.write_text("")
        name = temporary.name
    dead = name.replace(f"-{os.getpid():x}-", f"-{int(process.stdout):x}-")
    assert is_temporary(dead)
    (tmp_path / "run" / "run.json").rename(tmp_path / "run" / dead)
    run(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "log.jsonl",
        "model",
        "result.json",
        "run.json",
    ]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".mine").touch()
    with pytest.raises(OutputExistsError, match="holds something other than a run"):
        run(tmp_path / "other")


def test_temporary_files_of_other_writers_are_left_alone(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.txt") as first:
        first.write_text("a")
        with atomic_write(tmp_path / "b.txt") as second:
            second.write_text("b")
            assert first.exists()
        parent = first.with_name(first.name.replace(f"-{os.getpid():x}-", f"-{os.getppid():x}-"))
        parent.touch()
        with atomic_write(tmp_path / "c.txt") as third:
            third.write_text("c")
    assert sorted(tmp_path.iterdir()) == sorted([parent, *(tmp_path / f"{name}.txt" for name in "abc")])


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_file_that_another_process_wrote_in_the_meantime_is_not_replaced(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse_link)
    path = tmp_path / "map.png"

    def write() -> None:
        with atomic_write(path, overwrite=False) as temporary:
            temporary.write_text("second")
            path.write_text("first")

    with pytest.raises(OutputExistsError, match="already exists: choose another name or allow overwriting"):
        write()
    assert path.read_text() == "first"
    path.unlink()
    with atomic_write(path, overwrite=False) as temporary:
        temporary.write_text("alone")
    assert path.read_text() == "alone"
    assert list(tmp_path.iterdir()) == [path]


def test_a_second_run_in_a_folder_is_refused_and_names_the_process(tmp_path: Path, finished: Path) -> None:
    messages: list[str] = []

    def start_second(step: vs.Progress) -> None:
        if step.completed == 2 and not messages:
            with pytest.raises(WorkError, match=r"another run works on .*run \(process \d+\): wait") as error:
                vs.finetune(small_vit(), coloured(), out=tmp_path / "run", **OPTIONS)
            messages.append(str(error.value))

    tuned = run(tmp_path / "run", progress=start_second)
    assert str(os.getpid()) in messages[0]
    assert same(weights(tuned.model), weights(vs.load(finished)))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_lock_of_a_dead_process_does_not_block(tmp_path: Path) -> None:
    hidden_name(tmp_path / "run", "lock").write_text("1")
    with locked(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_holds_between_threads(tmp_path: Path) -> None:
    refusals: list[bool] = []

    def try_lock() -> None:
        try:
            with locked(tmp_path / "run"):
                refusals.append(False)
        except WorkError:
            refusals.append(True)

    with locked(tmp_path / "run"):
        thread = threading.Thread(target=try_lock)
        thread.start()
        thread.join()
    try_lock()
    assert refusals == [True, False]


def test_a_lock_inside_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises((CallError, SaveError), match="is a file or lies inside one"), locked(tmp_path / "file" / "run"):
        pass
