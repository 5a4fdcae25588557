"""The command ``vitscope lime``."""

import numpy as np
import pytest
from PIL import Image

import vitscope as vs
from tests.helpers.command_line import call, needs_bundled, photo_in_an_empty_folder, printed_results

pytestmark = needs_bundled
photo = photo_in_an_empty_folder
QUICK = ("--segments", "patches", "--num-samples", "70")


@pytest.mark.slow
def test_segments_are_printed_and_drawn(photo, capsys, monkeypatch):
    code, out, err = call(capsys, monkeypatch, "lime", photo, "--target", "frog", *QUICK)
    assert (code, err) == (0, "")
    predictions = vs.load("vit-nano").predict(photo, top_k=10)[0]
    [probability] = (prediction.probability for prediction in predictions if prediction.label == "frog")
    assert f"as vit-nano sees it: frog ({probability:.1%})" in out
    assert "wrote cat-lime.png" in out
    with Image.open("cat-lime.png") as figure:
        assert figure.width > 1000


@pytest.mark.slow
def test_json_equals_the_python_result(photo, capsys, monkeypatch):
    code, out, err = call(capsys, monkeypatch, "lime", photo, *QUICK, "--json", "--seed", "3")
    assert (code, err) == (0, "")
    ((entry,),) = [report["results"] for report in printed_results(out)]
    expected = vs.lime(vs.load("vit-nano"), photo, segments="patches", num_samples=70, seed=3)
    first = entry["images"][0]["classes"][0]
    assert first["label"] == expected.target == "cat"
    np.testing.assert_allclose(first["weights"], expected.weights, atol=1e-6)
    np.testing.assert_allclose(first["intervals"], expected.intervals, atol=1e-6)


@pytest.mark.slow
def test_two_models_are_compared(photo, capsys, monkeypatch):
    code, out, _ = call(
        capsys, monkeypatch, "lime", photo, "--segments", "slic", "-n", "150", "--model", "vit-nano,swin-nano"
    )
    assert code == 0
    assert "vit-nano and swin-nano" in out
    assert "swin-nano sees it: cat" in out, "both models explain the first model's class"
    code, out, _ = call(capsys, monkeypatch, "lime", photo, *QUICK[:2], "-n", "70", "--compare", "vit-nano", "--json")
    agreement = printed_results(out)[0]["agreement"]
    assert agreement["overlap"][0][1] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".npz", ".json", ".safetensors"])
def test_arrays_are_written(photo, tmp_path, capsys, monkeypatch, suffix):
    code, _, _ = call(capsys, monkeypatch, "lime", photo, *QUICK, "--arrays", f"cat{suffix}")
    assert code == 0
    assert (tmp_path / f"cat{suffix}").stat().st_size > 1000
    code, _, err = call(capsys, monkeypatch, "lime", photo, *QUICK, "--arrays", f"cat{suffix}")
    assert (code, err.count("\n")) == (2, 1)
    assert f"cat{suffix} exists already" in err


@pytest.mark.slow
def test_labels_come_from_a_file(photo, capsys, monkeypatch):
    labels = np.arange(300)[:, None] // 60 * 5 + np.arange(451) // 100
    np.save("labels.npy", labels)
    Image.fromarray(labels.astype(np.uint8)).save("labels.png")
    reports = []
    for name in ("labels.npy", "labels.png"):
        code, out, _ = call(capsys, monkeypatch, "lime", photo, "--segments", name, "-n", "70", "--json")
        assert code == 0
        reports.append(printed_results(out)[0]["results"][0]["images"])
    assert reports[0] == reports[1]
    assert [segment["label"] for segment in reports[0][0]["segments"]] == list(range(25))


@pytest.mark.slow
def test_too_few_samples_give_a_warning(photo, capsys, monkeypatch):
    code, out, err = call(capsys, monkeypatch, "lime", photo, "--segments", "patches", "-n", "30")
    assert (code, err.count("\n")) == (0, 1)
    assert "30 for 64 segments" in err
    assert "wrote cat-lime.png" in out


@pytest.mark.slow
def test_ctrl_c_keeps_finished_batches(photo, tmp_path, capsys, monkeypatch):
    """The third batch is interrupted: the figure of the first two is written, and says so."""
    from vitscope.models import VisionModel

    answer, batch_sizes = VisionModel.logits, []

    def interrupt(self, pixels):
        batch_sizes.append(len(pixels))
        if len(batch_sizes) == 4:  # the unmasked image, then two batches
            raise KeyboardInterrupt
        return answer(self, pixels)

    monkeypatch.setattr(VisionModel, "logits", interrupt)
    options = ("--segments", "patches", "-n", "500", "--batch-size", "40")
    code, out, err = call(capsys, monkeypatch, "lime", photo, *options)
    assert code == 1
    assert "80 of 500 samples" in err
    assert err.endswith("vitscope: interrupted; finished results are kept\n")
    assert "wrote cat-lime.png" in out
    assert (tmp_path / "cat-lime.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("text", "colour"), [("128", [128.0] * 3), ("0,64,255", [0.0, 64.0, 255.0])])
def test_hidden_segments_may_have_a_colour(photo, capsys, monkeypatch, text, colour):
    code, out, _ = call(capsys, monkeypatch, "lime", photo, *QUICK, "--hide", text, "--json")
    assert code == 0
    assert printed_results(out)[0]["results"][0]["provenance"]["parameters"]["hide"] == colour
