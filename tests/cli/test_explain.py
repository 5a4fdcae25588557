"""The command ``vitscope explain``."""

import dataclasses

import numpy as np
import pytest

import vitscope as vs
from tests.helpers.command_line import call, needs_bundled, photo_in_an_empty_folder, printed_results
from vitscope import models
from vitscope.explanation import explain
from vitscope.methods.registry import METHODS
from vitscope.views import figure

pytestmark = needs_bundled
photo = photo_in_an_empty_folder


@pytest.mark.slow
def test_json_holds_predictions_and_rollouts(photo, chelsea, capsys, monkeypatch):
    code, out, _ = call(capsys, monkeypatch, "explain", photo, "--json")
    (entry,) = printed_results(out)
    model = vs.load("vit-nano")
    assert code == 0
    assert entry["predictions"][0]["label"] == model.predict(chelsea)[0][0].label
    np.testing.assert_allclose(entry["rollouts"][0]["values"], vs.rollout(model, chelsea).values[0], atol=1e-6)
    class_map = vs.libra(model, chelsea)
    np.testing.assert_allclose(entry["class_map"]["values"], class_map.values[0], atol=1e-6)
    assert (entry["class_map"]["target"], entry["class_map"]["signed"]) == ("cat", True)
    assert entry["class_map"]["provenance"]["parameters"]["variant"] == "full_grad_plus"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit-nano", "swin-nano"])
def test_a_target_needs_no_method(photo, capsys, monkeypatch, model):
    scene = scenes(monkeypatch)
    code, out, err = call(capsys, monkeypatch, "explain", photo, "--model", model, "--target", "frog")
    assert (code, err) == (0, "")
    assert "  rollout  which patches reach the readout; the same for every class\n" in out
    assert "  libra    which patches raise (red) or lower (blue) the logit of frog\n" in out
    first, *others = vs.load(model).predict(photo, top_k=10)[0]
    probability = next(prediction.probability for prediction in others if prediction.label == "frog")
    (content,) = scene
    assert f"What supports frog ({probability:.1%}; predicted: {first.label}, {first.probability:.1%})" in content.title
    panel = content.rows[0].panels[1]
    assert (panel.title, panel.signed) == ("libra, frog", True)
    np.testing.assert_allclose(panel.values, vs.libra(vs.load(model), photo, target="frog").values[0], atol=1e-6)


@pytest.mark.slow
def test_a_model_without_classes_has_no_map_of_a_class(photo, capsys, monkeypatch):
    backbone = vs.load(vs.load("vit-nano").module.vit, image_size=32)
    monkeypatch.setattr(models, "load", lambda *_, **__: backbone)
    code, out, err = call(capsys, monkeypatch, "explain", photo)
    assert (code, err) == (0, "")
    assert "  libra    not available: the model names no class\n" in out
    code, out, _ = call(capsys, monkeypatch, "explain", photo, "--json")
    (entry,) = printed_results(out)
    assert (code, "class_map" in entry, entry["no_class_map"]) == (0, False, "the model names no class")
    assert len(entry["rollouts"]) == 2
    code, out, err = call(capsys, monkeypatch, "explain", photo, "--target", "dog")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "no classifier" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "exit_code"),
    [(vs.UnsupportedModelError("its weights are integers"), 2), (vs.WorkError("not enough memory"), 1)],
    ids=str,
)
def test_a_model_without_gradients_has_its_rollout(photo, capsys, monkeypatch, error, exit_code):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(explain, "libra", refuse)
    code, out, err = call(capsys, monkeypatch, "explain", photo)
    assert (code, err) == (0, "")
    assert f"  libra    not available: {error}\n" in out
    code, out, err = call(capsys, monkeypatch, "explain", photo, "--target", "dog")
    assert (code, out, err.count("\n")) == (exit_code, "", 1)
    assert str(error) in err


@pytest.mark.slow
def test_a_model_of_probabilities_has_its_rollout(photo, capsys, monkeypatch):
    model = dataclasses.replace(vs.load("vit-nano"), output="probabilities")
    monkeypatch.setattr(models, "load", lambda *_, **__: model)
    _, out, _ = call(capsys, monkeypatch, "explain", photo)
    assert "  libra    not available: vit-nano returns probabilities, and libra explains logits\n" in out


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit-nano", "swin-nano"])
@pytest.mark.parametrize("half", [0, 1])  # all of them have no room in one matrix of 100 columns
def test_every_gradient_method_explains_a_class(photo, capsys, monkeypatch, model, half):
    scene = scenes(monkeypatch)
    gradient = [name for name, method in METHODS.items() if method.kind == "gradient"][half::2]
    options = [word for name in ["rollout", *gradient] for word in ("--method", name)]
    code, out, err = call(capsys, monkeypatch, "explain", photo, "--model", model, "--target", "dog", *options)
    assert (code, err) == (0, "")
    assert "below the diagonal: rank correlation" in out
    assert max(map(len, out.splitlines())) <= 100
    (content,) = scene
    *maps, cells = (panel for row in content.rows for panel in row.panels)
    panels = {panel.title: panel for panel in maps}
    assert list(panels) == ["photo", "rollout", *gradient]
    assert cells.row_names == [f"{name}  {number}" for number, name in enumerate(["rollout", *gradient], 1)]
    assert content.title.startswith("What supports dog (")
    for name in gradient:
        baseline = ["baseline: black"] if name == "integrated_gradients" else []
        assert panels[name].lines == ["the logit", f"forward passes: {METHODS[name].forwards}", *baseline]
        expected = METHODS[name].compute(vs.load(model), photo, target="dog")
        assert panels[name].signed == expected.signed
        np.testing.assert_allclose(panels[name].values, expected.values[0], atol=1e-5)
    words = "for the class" if model == "swin-nano" else "the same for every class"
    assert panels["rollout"].lines == [f"attention, {words}", "forward passes: 1"]


def scenes(monkeypatch):
    """Return a list to which every scene that is drawn will be added."""
    drawn = []
    save_figure = figure.save_figure

    def keep(scene, *arguments, **options):
        drawn.append(scene)
        return save_figure(scene, *arguments, **options)

    monkeypatch.setattr(figure, "save_figure", keep)
    return drawn


@pytest.mark.slow
def test_methods_are_compared(photo, capsys, monkeypatch):
    code, out, err = call(
        capsys, monkeypatch, "explain", photo, "--method", "rollout", "--method", "occlusion", "-t", "dog"
    )
    assert (code, err) == (0, "")
    assert "rollout and occlusion" in out
    assert "wrote cat-explain.png" in out
    code, out, _ = call(capsys, monkeypatch, "explain", photo, "--method", "occlusion", "--json", "--out", "o.png")
    assert printed_results(out)[0]["results"]["occlusion"]["target"] == "cat"


@pytest.mark.slow
def test_ctrl_c_in_one_method_keeps_the_methods_before(photo, capsys, monkeypatch):
    from vitscope.perturb import MaskedModel

    def interrupt(_, masks, *__, **___):
        raise KeyboardInterrupt if len(masks) > 64 else AssertionError("occlusion came after the interruption")

    monkeypatch.setattr(MaskedModel, "evaluate", interrupt)
    methods = ("--method", "rollout", "--method", "lime", "--method", "occlusion")
    code, out, err = call(capsys, monkeypatch, "explain", photo, *methods)
    assert code == 1
    assert "interrupted" in err
    assert "wrote cat-explain.png" in out
