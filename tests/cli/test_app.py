"""The command line: what it prints, what it writes, and one clear line for every mistake."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitscope import cli
from vitscope.models import bundled_path

needs_bundled = pytest.mark.skipif(not (bundled_path("vit-nano") / "config.json").exists(), reason="no bundled model")
pytestmark = needs_bundled


@pytest.fixture(name="photo")
def photo_in_an_empty_folder(tmp_path, chelsea, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(chelsea).save("cat.png")
    return "cat.png"


def run(capsys, monkeypatch, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a call in this process."""
    monkeypatch.setattr(sys, "argv", ["vitscope", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def test_demo_names_the_cat_and_writes_a_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, monkeypatch, "demo")
    assert code == 0
    first_class = out.splitlines()[2].split()[0]
    assert first_class == "cat"
    assert "wrote vitscope-demo.png" in out
    with Image.open("vitscope-demo.png") as figure:
        assert figure.width > 1000
    code, out, _ = run(capsys, monkeypatch, "demo")
    assert "wrote vitscope-demo-2.png" in out, "the first figure must not be replaced"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["explain"], "cat-explain.png"),
        (["attention"], "cat-attention.png"),
        (["attention", "--layer", "-1", "--query", "2,3"], "cat-attention.png"),
        (["rollout"], "cat-rollout.png"),
        (
            ["rollout", "--evolution", "--discard-ratio", "0.9", "--no-normalize", "--start-layer", "1"],
            "cat-rollout.png",
        ),
        (["rollout", "--head-fusion", "min"], "cat-rollout.png"),
    ],
)
def test_each_command_writes_its_figure(photo, tmp_path, capsys, monkeypatch, arguments, name):
    code, out, err = run(capsys, monkeypatch, arguments[0], photo, *arguments[1:])
    assert (code, err) == (0, "")
    assert out.endswith(f"wrote {name}\n")
    assert [path.name for path in tmp_path.iterdir() if path.name != "cat.png"] == [name]


def test_json_holds_the_values_that_python_gives(photo, chelsea, capsys, monkeypatch):
    import vitscope as vs

    code, out, _ = run(capsys, monkeypatch, "explain", photo, "--json")
    (entry,) = json.loads(out)
    model = vs.load("vit-nano")
    assert code == 0
    assert entry["predictions"][0]["label"] == model.predict(chelsea)[0][0].label
    np.testing.assert_allclose(entry["rollouts"][0]["values"], vs.rollout(model, chelsea).values[0], atol=1e-6)
    code, out, _ = run(capsys, monkeypatch, "rollout", photo, "--json", "--head-fusion", "max")
    values = json.loads(out)[0]["rollouts"][0]["values"]
    np.testing.assert_allclose(values, vs.rollout(model, chelsea, head_fusion="max").values[0], atol=1e-6)
    code, out, _ = run(capsys, monkeypatch, "attention", photo, "--json", "--layer", "2")
    maps = json.loads(out)[0]["values_mean_of_heads"]
    np.testing.assert_allclose(maps["2"], vs.attention_map(model, chelsea, layer=2).values[0], atol=1e-6)


def test_several_photos_go_to_a_folder(photo, tmp_path, capsys, monkeypatch):
    Image.open(photo).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("tac.png")
    code, _, _ = run(capsys, monkeypatch, "explain", photo, "tac.png", "--out", "figures")
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["cat-explain.png", "tac-explain.png"]
    code, _, err = run(capsys, monkeypatch, "explain", photo, "tac.png", "--out", "figures")
    assert (code, err.count("\n")) == (2, 1)
    assert "exists already" in err


def test_the_photo_itself_is_never_replaced(photo, tmp_path, capsys, monkeypatch):
    before = (tmp_path / photo).read_bytes()
    (tmp_path / "link.png").symlink_to(photo)
    for out in (photo, "./link.png"):
        for command in ("explain", "rollout", "attention", "lime"):
            code, _, err = run(capsys, monkeypatch, command, photo, "--out", out, "--overwrite")
            assert (code, err.count("\n")) == (2, 1)
            assert "the photo itself" in err
    assert (tmp_path / photo).read_bytes() == before


def test_out_is_replaced_only_when_allowed(photo, tmp_path, capsys, monkeypatch):
    kept = tmp_path / "mine.png"
    kept.write_bytes(b"precious")
    code, _, err = run(capsys, monkeypatch, "rollout", photo, "--out", "mine.png")
    assert (code, kept.read_bytes()) == (2, b"precious")
    assert "mine.png exists already" in err
    code, _, _ = run(capsys, monkeypatch, "rollout", photo, "--out", "mine.png", "--overwrite")
    assert code == 0
    assert kept.read_bytes() != b"precious"


def test_a_full_disk_costs_nothing_that_was_there(photo, tmp_path, capsys, monkeypatch):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    def full(_, path):
        Path(path).write_bytes(b"half a fig")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "mine.png").write_bytes(b"precious")
    monkeypatch.setattr(FigureCanvasAgg, "print_png", full)
    code, _, err = run(capsys, monkeypatch, "rollout", photo, "--out", "mine.png", "--overwrite")
    assert code == 1
    assert err == "vitscope: cannot write mine.png: No space left on device\n"
    assert (tmp_path / "mine.png").read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat.png", "mine.png"]


@pytest.mark.parametrize(
    ("arguments", "expected_code", "words"),
    [
        (["explain", "nowhere.jpg"], 2, "nowhere.jpg does not exist"),
        (["explain", "."], 2, "is a folder"),
        (["explain", "cat.png", "--model", "vit-nanoo"], 2, "did you mean 'vit-nano'"),
        (["explain", "cat.png", "--model", "some/model"], 1, "vit-nano"),
        (["explain", "cat.png", "--out", "figure.jpg"], 2, "end the name in .png"),
        (["explain", "cat.png", "--out", "cat.png/below.png"], 1, "cannot write"),
        (["explain", "cat.png", "cat.png", "--out", "one.png"], 2, "pass a folder"),
        (["explain", "cat.png", "--device", "abacus"], 1, "abacus"),
        (["explain"], 2, "PHOTO"),
        (["attention", "cat.png", "--layer", "6"], 2, "layers 0 to 5"),
        (["attention", "cat.png", "--query", "8,0"], 2, "outside the grid"),
        (["attention", "cat.png", "--query", "register_1"], 2, "unknown query"),
        (["attention", "cat.png", "--query", "a,b"], 2, "unknown query"),
        (["rollout", "cat.png", "--head-fusion", "median"], 2, "median"),
        (["rollout", "cat.png", "--discard-ratio", "1.5"], 2, "between 0 and 1"),
        (["rollout", "cat.png", "--start-layer", "6"], 2, "layers 0 to 5"),
        (["frobnicate"], 2, "frobnicate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
@pytest.mark.usefixtures("photo")
def test_a_mistake_is_one_clear_line(tmp_path, capsys, monkeypatch, arguments, expected_code, words):
    code, out, err = run(capsys, monkeypatch, *arguments)
    assert (code, out) == (expected_code, "")
    assert err.startswith("vitscope: ")
    assert err.count("\n") == 1
    assert words in err
    assert [path.name for path in tmp_path.iterdir()] == ["cat.png"]


def test_a_model_without_attention_says_so(photo, capsys, monkeypatch):
    import vitscope.models

    torchvision = pytest.importorskip("torchvision")
    resnet = vitscope.models.load(torchvision.models.resnet18())
    monkeypatch.setattr(vitscope.models, "load", lambda *_, **__: resnet)
    code, _, err = run(capsys, monkeypatch, "explain", photo)
    assert code == 2
    assert "no attention" in err


def test_ctrl_c_is_one_line(photo, capsys, monkeypatch):
    import vitscope.tracing.capture

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(vitscope.tracing.capture, "run", interrupted)
    code, _, err = run(capsys, monkeypatch, "explain", photo)
    assert (code, err.count("\n")) == (1, 1)
    assert "interrupted" in err


def test_an_unforeseen_error_is_one_line_too(photo, capsys, monkeypatch):
    import vitscope.tracing.capture

    def broken(*_, **__):
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr(vitscope.tracing.capture, "run", broken)
    code, _, err = run(capsys, monkeypatch, "explain", photo)
    assert (code, err.count("\n")) == (1, 1)
    assert "ZeroDivisionError: first line" in err


def test_models_lists_every_library(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "models", "--json")
    assert code == 0
    assert {row["library"] for row in json.loads(out)} == {"vitscope", "transformers", "timm", "torchvision"}
    code, out, _ = run(capsys, monkeypatch, "models")
    assert "--model vit-nano" in out


def test_the_command_is_installed():
    done = subprocess.run([sys.executable, "-m", "vitscope.cli", "--help"], capture_output=True, text=True, check=True)
    for command in ("demo", "explain", "attention", "rollout", "lime", "methods", "models"):
        assert command in done.stdout


def test_names_that_look_like_markup_are_printed_as_they_are(photo, capsys, monkeypatch):
    Path(photo).rename("[old] $x^$ :cat:.png")
    code, out, err = run(capsys, monkeypatch, "explain", "[old] $x^$ :cat:.png")
    assert (code, err) == (0, "")
    assert "[old] $x^$ :cat:.png, as vit-nano" in out


def test_math_signs_in_a_title_are_letters():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    import vitscope as vs
    from vitscope.views import figure, scene

    panel = scene.Panel(vs.InputImage(Image.new("RGB", (8, 8)), (0.0, 0.0, 8.0, 8.0)), None, "$x^$")
    drawn = figure.draw(scene.Scene([scene.Row([panel], 1)], "$x^$"))
    FigureCanvasAgg(drawn).draw()
    assert [text.get_text() for text in drawn.texts].count("$x^$") == 2


def test_a_folder_with_a_dot_is_a_folder(photo, tmp_path, capsys, monkeypatch):
    (tmp_path / "run.1").mkdir()
    code, _, _ = run(capsys, monkeypatch, "explain", photo, "--out", "run.1")
    assert code == 0
    assert (tmp_path / "run.1" / "cat-explain.png").exists()


def test_without_a_command_the_help_is_readable(capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch)
    assert code == 2
    assert (out + err).count("\n") > 5


def test_what_was_finished_before_a_bad_photo_is_reported(photo, tmp_path, capsys, monkeypatch):
    (tmp_path / "bad.png").write_text("no image")
    code, out, err = run(capsys, monkeypatch, "explain", photo, "bad.png", "--json", "--out", "figures")
    assert (code, err.count("\n")) == (1, 1)
    assert [entry["image"] for entry in json.loads(out)] == [photo]
    assert (tmp_path / "figures" / "cat-explain.png").exists()
    code, out, err = run(capsys, monkeypatch, "explain", photo, "nowhere.png", "--out", "other")
    assert (code, out) == (2, ""), "all photos are looked for before the first is explained"
    assert not (tmp_path / "other").exists()
