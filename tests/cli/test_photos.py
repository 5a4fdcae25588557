"""Photos of the command line: files, folders and globs, and the names of their outputs."""

from pathlib import Path

import pytest

import vitscope as vs
from vitscope.cli.photos import photo_files


@pytest.fixture(name="folder", autouse=True)
def class_folders(tmp_path, monkeypatch):
    """Change to a folder with photos in class folders; the files are only looked for, never read."""
    for name in ("pics/cats/a.png", "pics/cats/b.JPG", "pics/dogs/a.png", "pics/.cache/c.png", "pics/cats/.d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "pics/notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def named(*arguments):
    files = photo_files([Path(argument) for argument in arguments], None, None)
    return [(str(file), file.output_name) for file in files]


def test_a_folder_is_searched_and_names_its_photos_by_their_paths():
    expected = [("pics/cats/a.png", "cats_a"), ("pics/cats/b.JPG", "cats_b"), ("pics/dogs/a.png", "dogs_a")]
    assert named("pics") == expected
    assert named("pics/cats") == [("pics/cats/a.png", "a"), ("pics/cats/b.JPG", "b")]
    assert all(file.folder == Path("pics") for file in photo_files([Path("pics")], None, None))


def test_a_glob_is_expanded_unless_a_file_has_this_name(folder):
    assert named("pics/*/a.png") == [("pics/cats/a.png", "cats_a"), ("pics/dogs/a.png", "dogs_a")]
    assert named("pics/**/b.*") == [("pics/cats/b.JPG", "b")]
    assert [file for file, _ in named("pic*")] == [file for file, _ in named("pics")]
    (folder / "x[1].png").touch()
    (folder / "x1.png").touch()
    assert named("x[1].png") == [("x[1].png", "x[1]")]


def test_equal_names_are_kept_apart(folder):
    assert named("pics/cats/a.png") == [("pics/cats/a.png", "a")]
    assert [name for _, name in named("pics/cats/a.png", "pics/dogs/a.png")] == ["cats_a", "dogs_a"]
    (folder / "pics/dogs/a.jpg").touch()
    assert [name for _, name in named("pics/dogs")] == ["a_jpg", "a_png"]


def test_a_photo_counts_once():
    assert [name for _, name in named("pics/cats/a.png", "pics", "pics/*/a.png")] == ["a", "cats_b", "dogs_a"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("nowhere.png", "nowhere.png does not exist"),
        ("no*.png", r"no\*.png matches no file: pass photos, a folder, or another pattern in quotes"),
        ("empty", "empty holds no images"),
        ("https://example.org/a.png?size=1", "is a URL"),
    ],
)
def test_an_argument_without_photos_is_refused(folder, argument, message):
    (folder / "empty").mkdir()
    with pytest.raises(vs.CallError, match=message):
        named(argument)


def test_the_window_applies_to_all_photos():
    files = photo_files([Path("pics")], "0,80", 3)
    assert {(file.window, file.slice) for file in files} == {((0.0, 80.0), 3)}
    assert photo_files(None, None, None) is None
    with pytest.raises(vs.CallError, match="pass one"):
        photo_files([], "0,80", None)
