"""Atomic writes: a result exists completely or not at all, and an older file is never lost."""

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
    with atomic_write(path, **options) as temporary:
        temporary.write_text(text)


def is_unchanged(path: Path) -> bool:
    return path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_missing_folders_are_created(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "map.png"
    write(path)
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_an_old_file_is_replaced_by_default(target: Path) -> None:
    write(target)
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_the_old_file_remains_until_the_block_ends(target: Path) -> None:
    with atomic_write(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
        assert (temporary.parent, temporary.suffix) == (target.parent, target.suffix)


def test_an_existing_file_is_refused_before_the_block_runs_without_overwrite(target: Path) -> None:
    with pytest.raises(OutputExistsError, match="already exists") as error:
        write(target, overwrite=False)
    assert is_unchanged(target)
    assert error.value.exit_code == 2


def test_a_new_file_is_written_without_overwrite(tmp_path: Path) -> None:
    write(tmp_path / "map.png", overwrite=False)
    assert (tmp_path / "map.png").read_text() == "new"


@pytest.mark.parametrize("raised", [ValueError("no"), KeyboardInterrupt()], ids=repr)
def test_an_error_in_the_block_is_raised_and_changes_nothing(target: Path, raised: BaseException) -> None:
    def fail() -> None:
        with atomic_write(target) as temporary:
            temporary.write_text("half of the n")
            raise raised

    with pytest.raises(type(raised)) as error:
        fail()
    assert error.value is raised
    assert is_unchanged(target)


def test_a_full_disk_gives_one_line_and_keeps_the_old_file(target: Path) -> None:
    def fill() -> None:
        with atomic_write(target) as temporary:
            temporary.write_text("half of the n")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))

    with pytest.raises(SaveError, match=r"^cannot write .*map\.png: No space left on device$") as error:
        fill()
    assert isinstance(error.value, WorkError)
    assert error.value.exit_code == 1
    assert is_unchanged(target)


def test_a_file_that_cannot_be_renamed_is_deleted(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self), None, str(target))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(SaveError, match="Permission denied"):
        write(target)
    assert is_unchanged(target)


def test_a_folder_that_cannot_be_created_gives_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(SaveError, match=r"cannot write .*map\.png: Permission denied"):
        write(tmp_path / "closed" / "map.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["map.png", "deeper/map.png"])
def test_a_file_in_place_of_a_folder_is_refused(target: Path, below: str) -> None:
    with pytest.raises(SaveError, match=r"is a file, not a folder|Not a directory"):
        write(target / below)
    assert is_unchanged(target)


def test_the_path_of_a_folder_is_refused(tmp_path: Path) -> None:
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


def test_the_longest_possible_name_is_written_and_a_longer_one_gives_one_line(tmp_path: Path) -> None:
    longest = tmp_path / ("n" * 251 + ".png")
    write(longest)
    assert longest.read_text() == "new"
    with pytest.raises(SaveError, match="File name too long"):
        write(tmp_path / ("n" * 300 + ".png"))
