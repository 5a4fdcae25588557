"""Batches of photos: failures are reported at the end, existing files skipped, and the summary is complete."""

import csv
import shutil
from pathlib import Path

import pytest
import typer
from PIL import Image

import vitscope as vs
from tests.helpers.command_line import call, needs_bundled, photo_in_an_empty_folder
from vitscope.cli.photo_batch import PhotoBatch
from vitscope.cli.photos import photo_files
from vitscope.cli.summary import COLUMNS, Summary

pytestmark = needs_bundled
photo = photo_in_an_empty_folder
ALL_COMMANDS = [
    ("explain", ()),
    ("attention", ("--drop-artefacts",)),
    ("rollout", ()),
    ("heads", ("--method", "gradient")),
    ("registers", ()),
    ("lime", ("--segments", "patches", "--num-samples", "70")),
]


@pytest.fixture(name="folder", autouse=True)
def class_folders(photo, tmp_path):
    """Return a folder with photos of different sizes, one of which cannot be read."""
    for name in ("cats", "dogs"):
        (tmp_path / "pics" / name).mkdir(parents=True)
    shutil.move(photo, "pics/cats/a.png")
    Image.open("pics/cats/a.png").crop((100, 20, 220, 200)).save("pics/dogs/a.png")
    Path("pics/cats/bad.png").write_text("no image")
    return tmp_path


def draw_nothing(_, path, *__):
    path.parent.mkdir(exist_ok=True)
    path.touch()


def rows(path="figures/summary.csv"):
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize(("command", "options"), ALL_COMMANDS)
def test_a_bad_photo_does_not_end_the_batch(capsys, monkeypatch, command, options):
    monkeypatch.setattr(f"vitscope.cli.{command}.save", draw_nothing)
    code, out, err = call(capsys, monkeypatch, command, "pics", "--out", "figures", *options)
    assert code == 1
    assert "pics/cats/bad.png is not an image" in err.splitlines()[-1]
    assert err.count("bad.png") == 1
    names = [f"cats_a-{command}.png", f"dogs_a-{command}.png"]
    assert sorted(path.name for path in Path("figures").iterdir()) == [*names, "summary.csv"]
    assert out.splitlines()[-3:] == [*(f"wrote figures/{name}" for name in names), "wrote figures/summary.csv"]
    assert [row["file"] for row in rows()] == names


@pytest.mark.slow
def test_the_summary_names_class_target_and_score(capsys, monkeypatch):
    monkeypatch.setattr("vitscope.cli.explain.save", draw_nothing)
    code, _, _ = call(capsys, monkeypatch, "explain", "pics/*/a.png", "-t", "dog", "--out", "figures")
    assert code == 0
    model, photos = vs.load("vit-nano"), ["pics/cats/a.png", "pics/dogs/a.png"]
    assert tuple(rows()[0]) == COLUMNS
    for row, photo, predictions in zip(rows(), photos, model.predict(photos, top_k=10), strict=True):
        score = next(prediction.probability for prediction in predictions if prediction.label == "dog")
        assert (row["photo"], row["predicted"], row["target"]) == (photo, predictions[0].label, "dog")
        assert float(row["probability"]) == pytest.approx(predictions[0].probability, rel=1e-4)
        assert float(row["score"]) == pytest.approx(score, rel=1e-4)
        assert (row["model"], row["method"]) == ("vit-nano", "libra, rollout, heads")


@pytest.mark.slow
def test_existing_figures_are_skipped(capsys, monkeypatch):
    arguments = ("rollout", "pics/*/a.png", "--head-fusion", "mean", "--out", "figures")
    assert call(capsys, monkeypatch, *arguments)[0] == 0
    before, summary = Path("figures/cats_a-rollout.png").stat().st_mtime_ns, rows()
    Path("figures/dogs_a-rollout.png").unlink()
    code, _, err = call(capsys, monkeypatch, *arguments)
    assert (code, "pass --overwrite, --skip-existing or another --out" in err) == (2, True)
    code, out, _ = call(capsys, monkeypatch, *arguments, "--skip-existing")
    assert (code, "skipped 1 of 2 photos" in out, "wrote figures/cats_a" in out) == (0, True, False)
    assert Path("figures/cats_a-rollout.png").stat().st_mtime_ns == before
    assert Path("figures/dogs_a-rollout.png").exists()
    assert rows() == summary
    code, _, err = call(capsys, monkeypatch, *arguments, "--skip-existing", "--overwrite")
    assert (code, "contradict" in err) == (2, True)


@pytest.mark.slow
def test_an_interrupted_batch_has_a_summary(capsys, monkeypatch):
    def interrupt(_, path, *__):
        if "dogs" in path.name:
            raise KeyboardInterrupt
        path.touch()

    Path("figures").mkdir()
    monkeypatch.setattr("vitscope.cli.rollout.save", interrupt)
    code, _, err = call(capsys, monkeypatch, "rollout", "pics", "--out", "figures")
    assert (code, "bad.png is not an image" in err, "interrupted" in err) == (1, True, True)
    assert [row["file"] for row in rows()] == ["cats_a-rollout.png"]


def batch(*arguments, **options):
    photos = photo_files([Path(argument) for argument in arguments], None, None)
    return PhotoBatch(photos, "rollout", None, **{"overwrite": False, **options})


def test_figures_in_the_folder_of_the_photos_are_refused(monkeypatch):
    with pytest.raises(vs.CallError, match="the folder of the photos, and the next call would explain them"):
        batch(".")
    monkeypatch.chdir("pics/cats")
    with pytest.raises(vs.CallError, match="the folder of the photos"):
        batch("..")
    batch("../dogs")


def test_the_format_of_a_figure_is_named_by_out_and_several_figures_are_png():
    def figures(*arguments, out, **options):
        photos = photo_files([Path(argument) for argument in arguments], None, None)
        return [path.name for _, path in PhotoBatch(photos, "rollout", Path(out), overwrite=False, **options)]

    assert figures("pics/cats/a.png", out="a.PDF") == ["a.PDF"]
    assert figures("pics/cats/a.png", out="a.html", report=True) == ["a.html"]
    assert figures("pics/*/a.png", out="figures", report=True) == ["cats_a-rollout.png", "dogs_a-rollout.png"]
    with pytest.raises(vs.CallError, match=r"end the name in \.png, \.pdf or \.svg"):
        figures("pics/cats/a.png", out="a.html")
    with pytest.raises(vs.CallError, match="one file for 2 photos: pass a folder"):
        figures("pics/*/a.png", out="a.html", report=True)


def test_an_error_of_the_call_ends_the_batch_unless_another_photo_was_explained(capsys):
    def explain(explained):
        with batch("pics/*/a.png") as photos:
            photos._report = explained
            for photo, _ in photos:
                with photos.explaining(photo):
                    raise vs.CallError("an image of one segment")

    with pytest.raises(vs.CallError, match="one segment"):
        explain([])
    with pytest.raises(typer.Exit) as caught:
        explain([{"figure": "earlier.png"}])
    assert caught.value.exit_code == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"vitscope: pics/{name}/a.png: an image of one segment" for name in ("cats", "dogs")]


def test_the_only_photo_fails_as_an_error(folder, capsys, monkeypatch):
    code, out, err = call(capsys, monkeypatch, "rollout", "pics/cats/bad.png")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert [path.name for path in folder.iterdir()] == ["pics"]


def test_a_summary_keeps_the_lines_of_other_files():
    model, path = vs.load("vit-nano"), Path("summary.csv")
    for file, target in (("a.png", "cat"), ("b.png", None), ("a.png", "dog")):
        summary = Summary(path, overwrite=False)
        summary.add(model, "pics/cats/a.png", "pics/cats/a.png", target, "lime", file)
        assert summary.write() == path
    assert [(row["file"], row["target"]) for row in rows(path)] == [("a.png", "dog"), ("b.png", "")]
    assert Summary(path, overwrite=False).write() is None


def test_another_table_is_not_replaced():
    Path("summary.csv").write_text("mine\n1\n")
    with pytest.raises(vs.CallError, match="is no summary of vitscope"):
        Summary(Path("summary.csv"), overwrite=False)
    Summary(Path("summary.csv"), overwrite=True)
    assert Path("summary.csv").read_text() == "mine\n1\n"
