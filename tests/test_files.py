"""replacing(): a result is there whole or not at all, and what was there before is never lost."""

import errno
import os
from pathlib import Path

import pytest

from vitscope.errors import CallError, OutputExistsError, SaveError, WorkError
from vitscope.files import atomic_write


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "map.png"
    path.write_text("old")
    return path


def write(path: Path, text: str = "new", **options: bool) -> None:
    with atomic_write(path, **options) as beside:
        beside.write_text(text)


def only_the_old(path: Path) -> bool:
    return path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_a_new_file_appears_with_the_folders_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "map.png"
    write(path)
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_an_old_file_is_replaced_by_default(target: Path) -> None:
    write(target)
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_until_the_block_ends_the_old_file_stands(target: Path) -> None:
    with atomic_write(target) as beside:
        beside.write_text("new")
        assert target.read_text() == "old"
        assert (beside.parent, beside.suffix) == (target.parent, target.suffix)


def test_without_leave_to_overwrite_nothing_runs(target: Path) -> None:
    with pytest.raises(OutputExistsError, match="exists already") as error:
        write(target, overwrite=False)
    assert only_the_old(target)
    assert error.value.exit_code == 2


def test_overwriting_forbidden_is_no_matter_for_a_new_file(tmp_path: Path) -> None:
    write(tmp_path / "map.png", overwrite=False)
    assert (tmp_path / "map.png").read_text() == "new"


@pytest.mark.parametrize("raised", [ValueError("no"), KeyboardInterrupt()], ids=repr)
def test_a_failing_block_passes_its_error_on_and_changes_nothing(target: Path, raised: BaseException) -> None:
    def fail() -> None:
        with atomic_write(target) as beside:
            beside.write_text("half of the ne")
            raise raised

    with pytest.raises(type(raised)) as error:
        fail()
    assert error.value is raised
    assert only_the_old(target)


def test_a_full_disk_is_one_line_and_the_old_file_survives(target: Path) -> None:
    def fill() -> None:
        with atomic_write(target) as beside:
            beside.write_text("half of the ne")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(beside))

    with pytest.raises(SaveError, match=r"^cannot write .*map\.png: No space left on device$") as error:
        fill()
    assert isinstance(error.value, WorkError)
    assert error.value.exit_code == 1
    assert only_the_old(target)


def test_a_file_that_cannot_take_its_place_is_taken_away(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, other: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self), None, str(other))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(SaveError, match="Permission denied"):
        write(target)
    assert only_the_old(target)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(SaveError, match=r"cannot write .*map\.png: Permission denied"):
        write(tmp_path / "closed" / "map.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["map.png", "deeper/map.png"])
def test_a_file_where_a_folder_is_needed(target: Path, below: str) -> None:
    with pytest.raises(SaveError, match=r"is a file, not a folder|Not a directory"):
        write(target / below)
    assert only_the_old(target)


def test_a_folder_is_no_place_for_a_result(tmp_path: Path) -> None:
    for overwrite in (True, False):
        with pytest.raises(OutputExistsError, match="is a folder") as error:
            write(tmp_path, overwrite=overwrite)
        assert isinstance(error.value, CallError)
    assert tmp_path.is_dir()


def test_a_device_or_pipe_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    with pytest.raises(OutputExistsError, match="is a device or a pipe"):
        write(pipe)
    assert pipe.is_fifo()


def test_a_long_name_is_written_and_a_longer_one_is_one_line(tmp_path: Path) -> None:
    longest = tmp_path / ("n" * 251 + ".png")
    write(longest)
    assert longest.read_text() == "new"
    with pytest.raises(SaveError, match="File name too long"):
        write(tmp_path / ("n" * 300 + ".png"))
