"""Folders of images with links, pipes, devices, folders named as images, and names that are not UTF-8."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import vitscope as vs
from tests.helpers.coloured import coloured_folder
from vitscope.errors import CallError, VitscopeWarning, WorkError
from vitscope.tune.data_options import DataOptions
from vitscope.tune.leakage import check_data

COUNTS = {"red": 4, "blue": 4}


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    return coloured_folder(tmp_path / "birds", COUNTS)


def socket(path: Path) -> None:
    import socket as sockets

    with sockets.socket(sockets.AF_UNIX) as created:
        before = Path.cwd()
        os.chdir(path.parent)  # a socket's path must be short
        try:
            created.bind(path.name)
        finally:
            os.chdir(before)


def looping(path: Path) -> None:
    path.with_name("other.png").symlink_to(path)
    path.symlink_to(path.with_name("other.png"))


UNREADABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "dangling": (lambda path: path.symlink_to("nowhere.png"), "is a broken link"),
    "looping": (looping, "is a broken link"),
    "pipe": (os.mkfifo, "is a named pipe, not a file"),
    "link to a pipe": (lambda path: (os.mkfifo(f"{path}.fifo"), path.symlink_to(f"{path}.fifo")), "is a named pipe"),  # type: ignore[dict-item,func-returns-value]
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a file"),
    "socket": (socket, "is a socket, not a file"),
    "folder": (Path.mkdir, "is a folder, not a file"),
    "link back": (
        lambda path: path.symlink_to(path.parent.parent, target_is_directory=True),
        "is a folder, not a file",
    ),
    "text": (lambda path: path.write_text("no image"), "x.png"),  # type: ignore[dict-item,func-returns-value]
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_path_that_is_not_an_image_is_refused_or_skipped_and_named(kind: str, birds: Path) -> None:
    make, reason = UNREADABLE[kind]
    make(birds / "red" / "x.png")
    check = check_data(vs.load_data(birds))
    assert check.unreadable
    with pytest.raises(WorkError, match=r"cannot be read: .*x\.png") as error:
        check.clean_data()
    assert "\n" not in str(error.value)
    assert reason in str(error.value)
    with pytest.warns(VitscopeWarning, match=r"x\.png.*: skipped"):
        data = check.clean_data(DataOptions(unreadable="skip", drop_duplicates=True))
    assert sum(map(len, (data.train, data.test))) == 8


@pytest.mark.slow
def test_a_training_run_skips_unreadable_images(birds: Path, tmp_path: Path) -> None:
    from tests.helpers.coloured import small_vit

    for name in ("dangling", "pipe", "folder"):
        UNREADABLE[name][0](birds / "red" / f"{name}.png")
    with pytest.warns(VitscopeWarning, match="3 images of birds cannot be read: .*: skipped"):
        tuned = vs.finetune(
            small_vit(),
            birds,
            out=tmp_path / "run",
            data_options=DataOptions(unreadable="skip"),
            epochs=1,
            augment=(),
        )
    assert sum(tuned.record["images"].values()) == 8


def test_images_in_a_linked_folder_count(birds: Path, tmp_path: Path) -> None:
    elsewhere = coloured_folder(tmp_path / "elsewhere", {"red": 3})
    (birds / "red" / "more").symlink_to(elsewhere / "red", target_is_directory=True)
    (birds / "red" / "older.png").mkdir()
    (elsewhere / "red" / "0.png").rename(birds / "red" / "older.png" / "0.png")
    assert sum(vs.load_data(birds).counts()["red"]) == 4 + 3
    (birds / "green").symlink_to(coloured_folder(tmp_path / "third", {"green": 5}) / "green")
    assert sum(vs.load_data(birds).counts()["green"]) == 5


def test_a_broken_link_to_a_class_is_refused(birds: Path) -> None:
    (birds / "green").symlink_to("gone", target_is_directory=True)
    with pytest.raises(CallError, match="green is a broken link: repair or delete it"):
        vs.load_data(birds)


def test_a_broken_link_below_a_class_is_reported(birds: Path) -> None:
    (birds / "red" / "more").symlink_to("gone", target_is_directory=True)
    (birds / "red" / "README.txt").symlink_to("gone.txt")
    assert [reason for *_, reason in check_data(vs.load_data(birds)).unreadable] == [
        f"{birds / 'red' / 'more'} is a broken link"
    ]


@pytest.mark.parametrize("name", [b"caf\xe9", b"\xff\xfe"])
def test_a_class_whose_name_is_not_utf8_is_refused(name: bytes, birds: Path) -> None:
    os.rename(os.fsencode(birds / "red"), os.path.join(os.fsencode(birds), name))  # noqa: PTH104, PTH118
    with pytest.raises(CallError, match="has a name that is not UTF-8: rename this folder") as error:
        vs.load_data(birds)
    str(error.value).encode()


@pytest.mark.slow
def test_an_image_whose_name_is_not_utf8_is_read_and_reported(birds: Path, tmp_path: Path) -> None:
    from tests.helpers.coloured import small_vit

    path = os.fsencode(birds / "red") + b"/caf\xe9.png"
    (birds / "red" / "0.png").rename(os.fsdecode(path))
    tuned = vs.finetune(small_vit(), birds, out=tmp_path / "run", epochs=1, augment=())
    assert sum(tuned.record["images"].values()) == 8
    with open(path, "wb") as file:  # noqa: PTH123
        file.write(b"damaged")
    (reason,) = (reason for *_, reason in check_data(vs.load_data(birds)).unreadable)
    assert "caf\\udce9.png" in reason
    reason.encode()


def test_reprs_are_short(birds: Path) -> None:
    data = vs.load_data(birds)
    for value in (data, data.train, check_data(data)):
        assert 10 < len(repr(value)) < 400
        assert len(repr(value).splitlines()) <= 5
