"""vitscope explain --target: the class goes to every method that takes one."""

import pytest

import vitscope as vs
from tests.cli.test_app import needs_bundled, photo_in_an_empty_folder, run
from tests.helpers.command_line import printed_results
from vitscope.cli.json_output import rounded

pytestmark = needs_bundled
photo = photo_in_an_empty_folder


@pytest.mark.slow
def test_rollout_of_a_window_transformer_takes_the_target(photo, capsys, monkeypatch):
    options = ("--model", "swin-nano", "--method", "rollout", "--target", "dog", "--json")
    code, out, err = run(capsys, monkeypatch, "explain", photo, *options)
    assert (code, err) == (0, "")
    result = printed_results(out)[0]["results"]["rollout"]
    expected = vs.rollout(vs.load("swin-nano"), photo, target="dog")
    assert result["target"] == expected.target == "dog"
    assert result["values"] == rounded(expected.as_json()["values"])


def test_rollout_that_has_no_readout_by_class_is_refused(photo, capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, "explain", photo, "--method", "rollout", "--target", "dog")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "a readout of one class is not available" in err


@pytest.mark.slow
def test_rollout_that_has_no_readout_by_class_stands_beside_a_method_that_has_a_target(photo, capsys, monkeypatch):
    options = ("--method", "rollout", "--method", "occlusion", "--target", "dog", "--json")
    code, out, err = run(capsys, monkeypatch, "explain", photo, *options)
    assert (code, err) == (0, "")
    results = printed_results(out)[0]["results"]
    assert (results["rollout"]["target"], results["occlusion"]["target"]) == (None, "dog")


def test_a_method_that_takes_no_target_refuses_one(photo, capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, "explain", photo, "--method", "attention", "--target", "dog")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "attention takes no target: add one of rollout, lime, kernel_shap, occlusion, rise" in err


@pytest.mark.slow
@pytest.mark.parametrize("method", ["attention", "rollout"])
def test_without_a_target_every_method_explains(photo, capsys, monkeypatch, method):
    code, _, err = run(capsys, monkeypatch, "explain", photo, "--method", method)
    assert (code, err) == (0, "")


@pytest.mark.slow
def test_a_contrast_goes_to_every_method_that_takes_one(photo, capsys, monkeypatch):
    options = ("--method", "rollout", "--method", "occlusion", "--method", "grad_cam", "--contrast", "dog", "--json")
    code, out, err = run(capsys, monkeypatch, "explain", photo, *options)
    assert (code, err) == (0, "")
    results = printed_results(out)[0]["results"]
    assert [results[name]["target"] for name in ("rollout", "occlusion", "grad_cam")] == [None, *2 * ["cat − dog"]]
    expected = vs.occlusion(vs.load("vit-nano"), photo, target=("cat", "dog"))
    assert results["occlusion"]["values"] == rounded(expected.as_json()["values"])


@pytest.mark.slow
def test_lime_contrasts_the_target_or_the_most_likely_class(photo, capsys, monkeypatch):
    options = ("--contrast", "dog", "--segments", "patches", "-n", "70", "--json", "--overwrite")
    for more, label in (((), "cat − dog"), (("--target", "frog"), "frog − dog")):
        code, out, err = run(capsys, monkeypatch, "lime", photo, *options, *more, "--compare", "swin-nano")
        assert (code, err) == (0, "")
        results = printed_results(out)[0]["results"]
        assert [result["target"] for result in results] == [label, label]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lime", "--contrast", "cat"), "a contrast of 'cat' with itself is always 0: pass two different classes"),
        (("lime", "-t", "dog", "--contrast", "5"), "a contrast of 'dog' with itself is always 0"),
        (("heads", "--contrast", "cat"), "a contrast of 'cat' with itself is always 0"),
        (("explain", "--method", "occlusion", "--contrast", "cat"), "a contrast of 'cat' with itself is always 0"),
        (("explain", "--contrast", "cat"), "a contrast of 'cat' with itself is always 0: pass two different classes"),
        (("explain", "--method", "rollout", "--contrast", "dog"), "rollout takes no contrast: add one of lime,"),
    ],
)
def test_a_contrast_without_a_meaning_is_refused_in_one_line(photo, capsys, monkeypatch, arguments, message):
    command, *options = arguments
    code, out, err = run(capsys, monkeypatch, command, photo, *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
