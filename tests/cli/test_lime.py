"""The command line's questions: lime, other methods of explain, and what a mistake or Ctrl-C leaves."""

import json

import numpy as np
import pytest
from PIL import Image

import vitscope as vs
from tests.cli.test_app import needs_bundled, photo_in_an_empty_folder, run

pytestmark = needs_bundled
photo = photo_in_an_empty_folder
QUICK = ("--segments", "patches", "--num-samples", "70")


def test_lime_names_segments_and_writes_a_figure(photo, capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, "lime", photo, "--target", "frog", *QUICK)
    assert (code, err) == (0, "")
    [probability] = (one.probability for one in vs.load("vit-nano").predict(photo, top_k=10)[0] if one.label == "frog")
    assert f"as vit-nano sees it: frog ({probability:.1%})" in out
    assert "wrote cat-lime.png" in out
    with Image.open("cat-lime.png") as figure:
        assert figure.width > 1000


def test_json_holds_what_python_gives(photo, capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, "lime", photo, *QUICK, "--json", "--seed", "3")
    assert (code, err) == (0, "")
    ((entry,),) = [report["results"] for report in json.loads(out)]
    expected = vs.lime(vs.load("vit-nano"), photo, segments="patches", num_samples=70, seed=3)
    first = entry["images"][0]["classes"][0]
    assert first["label"] == expected.target == "cat"
    np.testing.assert_allclose(first["weights"], expected.weights, atol=1e-6)
    np.testing.assert_allclose(first["intervals"], expected.intervals, atol=1e-6)


def test_two_models_and_how_they_agree(photo, capsys, monkeypatch):
    code, out, _ = run(
        capsys, monkeypatch, "lime", photo, *QUICK, "--segments", "slic", "-n", "150", "--compare", "swin-nano"
    )
    assert code == 0
    assert "vit-nano and swin-nano" in out
    assert "swin-nano sees it: cat" in out, "the first model's class is asked of the second"
    code, out, _ = run(capsys, monkeypatch, "lime", photo, *QUICK[:2], "-n", "70", "--compare", "vit-nano", "--json")
    agreement = json.loads(out)[0]["agreement"]
    assert agreement["overlap"][0][1] == 1.0


@pytest.mark.parametrize("suffix", [".npz", ".json", ".safetensors"])
def test_arrays_are_written_too(photo, tmp_path, capsys, monkeypatch, suffix):
    code, _, _ = run(capsys, monkeypatch, "lime", photo, *QUICK, "--arrays", f"cat{suffix}")
    assert code == 0
    assert (tmp_path / f"cat{suffix}").stat().st_size > 1000
    code, _, err = run(capsys, monkeypatch, "lime", photo, *QUICK, "--arrays", f"cat{suffix}")
    assert (code, err.count("\n")) == (2, 1)


def test_labels_come_from_a_file(photo, capsys, monkeypatch):
    labels = np.arange(300)[:, None] // 60 * 5 + np.arange(451) // 100
    np.save("labels.npy", labels)
    Image.fromarray(labels.astype(np.uint8)).save("labels.png")
    reports = []
    for name in ("labels.npy", "labels.png"):
        code, out, _ = run(capsys, monkeypatch, "lime", photo, "--segments", name, "-n", "70", "--json")
        assert code == 0
        reports.append(json.loads(out)[0]["results"][0]["images"])
    assert reports[0] == reports[1]
    assert [segment["label"] for segment in reports[0][0]["segments"]] == list(range(25))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["lime", "cat.png", "--target", "tabby"], 2, "the nearest labels are"),
        (["lime", "cat.png", "--num-samples", "many"], 2, "'auto'"),
        (["lime", "cat.png", "--num-samples", "1"], 2, "at least 2"),
        (["lime", "cat.png", "--segments", "squares"], 2, "quickshift, slic, patches"),
        (["lime", "cat.png", "--segments", "none.npy"], 2, "none.npy does not exist"),
        (["lime", "cat.png", "--segments", "cat.png"], 2, "300×451"),
        (["lime", "cat.png", "--hide", "nowhere.png"], 2, "choose mean"),
        (["lime", "cat.png", "--batch-size", "0"], 2, "at least 1"),
        (["lime", "cat.png", "--arrays", "x.csv"], 2, ".safetensors"),
        (["lime", "cat.png", "--compare", "vit-nanoo"], 2, "did you mean"),
        (["explain", "cat.png", "--method", "gradcam"], 2, "rollout, lime"),
        (["explain", "cat.png", "--target", "cat"], 2, "--method"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
@pytest.mark.usefixtures("photo")
def test_a_mistake_is_one_clear_line(tmp_path, capsys, monkeypatch, arguments, code, words):
    got, out, err = run(capsys, monkeypatch, *arguments)
    assert (got, out) == (code, "")
    assert err.startswith("vitscope: ")
    assert err.count("\n") == 1
    assert words in err
    assert [path.name for path in tmp_path.iterdir()] == ["cat.png"]


def test_too_few_samples_are_said_to_be_and_used(photo, capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, "lime", photo, "--segments", "patches", "-n", "30")
    assert (code, err.count("\n")) == (0, 1)
    assert "30 for 64 segments" in err
    assert "wrote cat-lime.png" in out


def test_ctrl_c_keeps_what_was_answered(photo, tmp_path, capsys, monkeypatch):
    """The third batch is interrupted: the figure of the first two is written, and says so."""
    from vitscope.models import VisionModel

    answer, asked = VisionModel.answer, []

    def interrupted(self, pixels):
        asked.append(len(pixels))
        if len(asked) == 4:  # the whole image alone, then two batches
            raise KeyboardInterrupt
        return answer(self, pixels)

    monkeypatch.setattr(VisionModel, "answer", interrupted)
    code, out, err = run(capsys, monkeypatch, "lime", photo, "--segments", "patches", "-n", "500", "--batch-size", "40")
    assert code == 1
    assert "80 of 500 samples" in err
    assert "interrupted; what was finished" in err
    assert "wrote cat-lime.png" in out
    assert (tmp_path / "cat-lime.png").exists()


def test_explain_sets_methods_side_by_side(photo, capsys, monkeypatch):
    code, out, err = run(
        capsys, monkeypatch, "explain", photo, "--method", "rollout", "--method", "occlusion", "-t", "dog"
    )
    assert (code, err) == (0, "")
    assert "rollout and occlusion" in out
    assert "wrote cat-explain.png" in out
    code, out, _ = run(capsys, monkeypatch, "explain", photo, "--method", "occlusion", "--json", "--out", "o.png")
    assert json.loads(out)[0]["results"]["occlusion"]["target"] == "cat"


def test_methods_lists_the_table(capsys, monkeypatch):
    from vitscope.methods.registry import METHODS

    code, out, _ = run(capsys, monkeypatch, "methods", "--json")
    assert code == 0
    assert [row["method"] for row in json.loads(out)] == list(METHODS)
    code, out, _ = run(capsys, monkeypatch, "methods")
    assert "occlusion" in out


@pytest.mark.parametrize(("text", "colour"), [("128", [128.0] * 3), ("0,64,255", [0.0, 64.0, 255.0])])
def test_hidden_parts_may_be_given_a_colour(photo, capsys, monkeypatch, text, colour):
    code, out, _ = run(capsys, monkeypatch, "lime", photo, *QUICK, "--hide", text, "--json")
    assert code == 0
    assert json.loads(out)[0]["results"][0]["provenance"]["parameters"]["hide"] == colour


def test_ctrl_c_in_one_method_ends_explain_with_what_there_is(photo, capsys, monkeypatch):
    from vitscope.perturb import MaskedModel

    def interrupted(_, masks, *__, **___):
        raise KeyboardInterrupt if len(masks) > 64 else AssertionError("occlusion came after the interruption")

    monkeypatch.setattr(MaskedModel, "evaluate", interrupted)
    methods = ("--method", "rollout", "--method", "lime", "--method", "occlusion")
    code, out, err = run(capsys, monkeypatch, "explain", photo, *methods)
    assert code == 1
    assert "interrupted" in err
    assert "wrote cat-explain.png" in out
