"""Where figures go: new names, folders, and files that are replaced only if allowed."""

import errno
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.command_line import call, needs_bundled, photo_in_an_empty_folder, printed_results
from vitscope.cli.output import shorten_stem, unused_path

pytestmark = needs_bundled
photo = photo_in_an_empty_folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["explain"], "cat-explain.png"),
        (["attention"], "cat-attention.png"),
        (["attention", "--layer", "-1", "--query", "2,3"], "cat-attention.png"),
        (["rollout"], "cat-rollout.png"),
        (["heads", "--method", "gradient"], "cat-heads.png"),
        (
            ["rollout", "--evolution", "--discard-ratio", "0.9", "--no-normalize", "--start-layer", "1"],
            "cat-rollout.png",
        ),
        (["rollout", "--head-fusion", "min"], "cat-rollout.png"),
    ],
)
def test_each_command_writes_its_figure(photo, tmp_path, capsys, monkeypatch, arguments, name):
    code, out, err = call(capsys, monkeypatch, arguments[0], photo, *arguments[1:])
    assert (code, err) == (0, "")
    assert out.endswith(f"wrote {name}\n")
    assert [path.name for path in tmp_path.iterdir() if path.name != "cat.png"] == [name]


@pytest.mark.slow
def test_several_photos_go_to_a_folder(photo, tmp_path, capsys, monkeypatch):
    Image.open(photo).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("tac.png")
    code, _, _ = call(capsys, monkeypatch, "explain", photo, "tac.png", "--out", "figures")
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        "cat-explain.png",
        "summary.csv",
        "tac-explain.png",
    ]
    code, _, err = call(capsys, monkeypatch, "explain", photo, "tac.png", "--out", "figures")
    assert (code, err.count("\n")) == (2, 1)
    assert "exists already" in err


@pytest.mark.slow
def test_a_folder_may_have_a_dot_in_its_name(photo, tmp_path, capsys, monkeypatch):
    (tmp_path / "run.1").mkdir()
    code, _, _ = call(capsys, monkeypatch, "explain", photo, "--out", "run.1")
    assert code == 0
    assert (tmp_path / "run.1" / "cat-explain.png").exists()


@pytest.mark.slow
def test_the_photo_itself_is_never_replaced(photo, tmp_path, capsys, monkeypatch):
    before = (tmp_path / photo).read_bytes()
    (tmp_path / "link.png").symlink_to(photo)
    for out in (photo, "./link.png"):
        for command in ("explain", "rollout", "attention", "heads", "lime"):
            code, _, err = call(capsys, monkeypatch, command, photo, "--out", out, "--overwrite")
            assert (code, err.count("\n")) == (2, 1)
            assert "the photo itself" in err
    assert (tmp_path / photo).read_bytes() == before


@pytest.mark.slow
def test_a_file_is_replaced_only_if_allowed(photo, tmp_path, capsys, monkeypatch):
    existing = tmp_path / "mine.png"
    existing.write_bytes(b"precious")
    code, _, err = call(capsys, monkeypatch, "rollout", photo, "--out", "mine.png")
    assert (code, existing.read_bytes()) == (2, b"precious")
    assert "mine.png exists already" in err
    code, _, _ = call(capsys, monkeypatch, "rollout", photo, "--out", "mine.png", "--overwrite")
    assert code == 0
    assert existing.read_bytes() != b"precious"


@pytest.mark.slow
def test_a_full_disk_leaves_the_existing_file_as_it_was(photo, tmp_path, capsys, monkeypatch):
    def fill_the_disk(_, file, *__, **___):
        file.write(b"half a fig")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "mine.png").write_bytes(b"precious")
    monkeypatch.setattr(Image.Image, "save", fill_the_disk)
    code, _, err = call(capsys, monkeypatch, "rollout", photo, "--out", "mine.png", "--overwrite")
    assert code == 1
    assert err == "vitscope: cannot write mine.png: No space left on device\n"
    assert (tmp_path / "mine.png").read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat.png", "mine.png"]


@pytest.mark.slow
def test_photos_before_an_unreadable_one_are_reported(photo, tmp_path, capsys, monkeypatch):
    (tmp_path / "bad.png").write_text("no image")
    code, out, err = call(capsys, monkeypatch, "explain", photo, "bad.png", "--json", "--out", "figures")
    assert (code, err.count("\n")) == (1, 1)
    assert [entry["image"] for entry in printed_results(out)] == [photo]
    assert (tmp_path / "figures" / "cat-explain.png").exists()
    code, out, err = call(capsys, monkeypatch, "explain", photo, "nowhere.png", "--out", "other")
    assert (code, out) == (2, ""), "all photos must exist before the first is explained"
    assert not (tmp_path / "other").exists()


def test_a_fresh_name_is_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert unused_path("figure") == Path("figure.png")
    Path("figure.png").touch()
    Path("figure-2.png").touch()
    assert unused_path("figure") == Path("figure-3.png")
    assert unused_path("figure", "") == Path("figure")


def test_a_stem_is_shortened_by_whole_characters():
    assert shorten_stem("cat") == "cat"
    assert shorten_stem("ä" * 125) == "ä" * 100
