"""vs.explain: what the command ``vitscope explain`` computes, as a function."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import vitscope as vs
from vitscope.explanation.requests import method_requests
from vitscope.methods.registry import METHODS
from vitscope.models.heads import reset_classifier
from vitscope.perturb import MaskedModel


@pytest.fixture(scope="module")
def model() -> vs.VisionModel:
    return vs.load("vit-nano")


@pytest.fixture(scope="module")
def default(model: vs.VisionModel, chelsea: np.ndarray) -> vs.Explanation:
    return vs.explain(model, chelsea)


def test_the_default_maps_are_those_of_the_functions(
    model: vs.VisionModel, chelsea: np.ndarray, default: vs.Explanation
) -> None:
    expected = {
        "libra": vs.libra(model, chelsea),
        "rollout, mean of heads": vs.rollout(model, chelsea),
        "rollout, max of heads": vs.rollout(model, chelsea, head_fusion="max"),
    }
    assert list(default.results) == list(expected)
    for name, result in expected.items():
        torch.testing.assert_close(default.results[name].values, result.values, rtol=0, atol=1e-6)
        assert default.results[name].target == result.target
    (photo,) = default.photos
    trace = vs.capture(model, chelsea)
    assert len(photo.heads) == trace.step(-1).num_heads == 12
    for head, result in enumerate(photo.heads):
        torch.testing.assert_close(result.values, trace.map(-1, head, "readout"), rtol=0, atol=1e-6)
    assert list(default.predictions) == model.predict(chelsea, top_k=10)[0]
    assert (default.model, default.target, default.agreement, default.interrupted) == ("vit-nano", "cat", None, False)
    assert default.meanings == {
        "rollout": "which patches reach the readout; the same for every class",
        "libra": "which patches raise (red) or lower (blue) the logit of cat",
    }


@pytest.mark.slow
def test_a_name_is_a_model(chelsea: np.ndarray, default: vs.Explanation) -> None:
    named = vs.explain("vit-nano", chelsea)
    torch.testing.assert_close(named.results["libra"].values, default.results["libra"].values)


@pytest.mark.slow
def test_methods_are_compared(model: vs.VisionModel, chelsea: np.ndarray) -> None:
    explanation = vs.explain(model, chelsea, ["rollout", "grad_cam", "occlusion"], "dog")
    expected = [
        vs.rollout(model, chelsea),
        vs.grad_cam(model, chelsea, target="dog"),
        vs.occlusion(model, chelsea, target="dog"),
    ]
    assert list(explanation.results) == ["rollout", "grad_cam", "occlusion"]
    for result, other in zip(explanation.results.values(), expected, strict=True):
        torch.testing.assert_close(result.values, other.values, rtol=0, atol=1e-6)
        assert result.target == other.target
    agreement = vs.agreement(expected)
    np.testing.assert_allclose(explanation.agreement.rank_correlation, agreement.rank_correlation, atol=1e-4)
    assert explanation.target == "dog"
    assert explanation.meanings["grad_cam"] == METHODS["grad_cam"].summary


def test_shared_options_go_to_the_methods_that_take_them(model: vs.VisionModel, chelsea: np.ndarray) -> None:
    methods = {"occlusion": {"window": 4, "stride": 4}, "grad_cam": {}, "rollout": {}}
    results = vs.explain(model, chelsea, methods, hide="black", output="log_odds").results
    parameters = {name: result.provenance["parameters"] for name, result in results.items()}
    assert [parameters["occlusion"][key] for key in ("hide", "window", "output")] == ["black", 4, "log_odds"]
    assert parameters["grad_cam"]["output"] == "log_odds"
    assert "output" not in parameters["rollout"]
    expected = vs.occlusion(model, chelsea, window=4, stride=4, hide="black", output="log_odds")
    torch.testing.assert_close(results["occlusion"].values, expected.values)


FILLED = ["lime", "kernel_shap", "occlusion", "rise", "activation_patching", "integrated_gradients"]


def baselines(methods: Any, **options: Any) -> dict[str, Any]:
    """Return the baseline of each method that has one."""
    requests = {request.name: request.options for request in method_requests(methods, options)}
    return {name: value for name, own in requests.items() for key, value in own.items() if key in ("hide", "baseline")}


def test_methods_that_are_compared_have_the_same_baseline() -> None:
    assert baselines([*FILLED, "libra"]) == dict.fromkeys(FILLED, "mean")
    assert baselines(["rise", "integrated_gradients"]) == {"rise": "mean", "integrated_gradients": "mean"}
    assert baselines(["libra", "integrated_gradients"]) == {}  # nothing to compare it with: its own default
    assert baselines(FILLED, hide="blur") == baselines(FILLED, baseline="blur") == dict.fromkeys(FILLED, "blur")
    assert baselines(FILLED[:4], hide="drop") == dict.fromkeys(FILLED[:4], "drop")


def test_a_baseline_of_one_method_takes_precedence() -> None:
    methods = {"rise": {"hide": "black"}, "integrated_gradients": {}, "occlusion": {}}
    assert baselines(methods) == {"rise": "black", "integrated_gradients": "mean", "occlusion": "mean"}
    expected = {"rise": "black", "integrated_gradients": "grey", "occlusion": "grey"}
    assert baselines(methods, hide="grey") == expected
    both = baselines(["rise", "integrated_gradients"], hide="grey", baseline="blur")
    assert both == {"rise": "grey", "integrated_gradients": "blur"}


@pytest.mark.slow
def test_the_baseline_of_a_comparison_is_computed(model: vs.VisionModel, chelsea: np.ndarray) -> None:
    results = vs.explain(model, chelsea, ["occlusion", "integrated_gradients"], steps=2).results
    expected = vs.integrated_gradients(model, chelsea, steps=2, baseline="mean")
    torch.testing.assert_close(results["integrated_gradients"].values, expected.values)
    torch.testing.assert_close(results["occlusion"].values, vs.occlusion(model, chelsea).values)


def test_an_option_of_one_method_takes_precedence(model: vs.VisionModel, chelsea: np.ndarray) -> None:
    methods = {"libra": {"output": "probability"}, "grad_cam": {}}
    results = vs.explain(model, chelsea, methods, output="log_odds").results
    outputs = [result.provenance["parameters"]["output"] for result in results.values()]
    assert outputs == ["probability", "log_odds"]


def test_options_reach_the_default_maps(model: vs.VisionModel, chelsea: np.ndarray) -> None:
    explanation = vs.explain(model, chelsea, discard_ratio=0.5, output="log_odds")
    expected = vs.rollout(model, chelsea, discard_ratio=0.5)
    torch.testing.assert_close(explanation.results["rollout, mean of heads"].values, expected.values)
    assert explanation.meanings["libra"].endswith("the log-odds of cat")


@pytest.mark.slow
def test_photos_of_different_sizes_are_explained_one_by_one(
    model: vs.VisionModel, chelsea: np.ndarray, tmp_path
) -> None:
    path = tmp_path / "crop.png"
    Image.fromarray(chelsea[:200, 60:300]).save(path)
    with path.open("rb") as file:
        photos = [chelsea, path, Image.open(path), file]
        batch = vs.explain(model, photos, {"lime": {"segments": "patches", "num_samples": 70}, "libra": {}}, [*"3553"])
    assert [single.target for single in batch] == ["cat", "dog", "dog", "cat"]
    assert [photo.name for photo in batch.photos] == ["photo", str(path), str(path), "photo"]
    for name in ("lime", "libra"):
        first, second = (batch[index].results[name] for index in (1, 2))
        torch.testing.assert_close(first.values, second.values)
    expected = vs.libra(model, path, target="cat")
    torch.testing.assert_close(batch[-1].results["libra"].values, expected.values, rtol=0, atol=1e-6)


def test_preprocessed_tensors_are_explained(model: vs.VisionModel, chelsea: np.ndarray) -> None:
    pixels, _ = model.prepare([chelsea, chelsea[:, ::-1]])
    batch = vs.explain(model, pixels, "libra")
    torch.testing.assert_close(batch[1].results["libra"].values, vs.libra(model, pixels[1:]).values)


def test_every_photo_is_read_before_any_is_explained(model: vs.VisionModel, chelsea: np.ndarray, tmp_path) -> None:
    (tmp_path / "text.png").write_text("no image")
    reports: list[vs.Progress] = []
    with pytest.raises(vs.WorkError, match=r"text\.png"):
        vs.explain(model, [chelsea, tmp_path / "text.png"], progress=reports.append)
    assert reports == []


@pytest.mark.slow
def test_progress_counts_photos_or_evaluations(model: vs.VisionModel, chelsea: np.ndarray) -> None:
    reports: list[vs.Progress] = []
    vs.explain(model, [chelsea, chelsea], progress=reports.append)
    assert reports == [vs.Progress("explaining", 1, 2), vs.Progress("explaining", 2, 2)]
    reports.clear()
    vs.explain(model, chelsea, ["libra", "occlusion"], progress=reports.append)
    assert reports == [vs.Progress("evaluating", 64, 64)]


def test_a_model_without_classes_has_no_map_of_a_class(model: vs.VisionModel, chelsea: np.ndarray) -> None:
    backbone = vs.load(model.module.vit, image_size=32)
    pixels, _ = model.prepare(chelsea)
    explanation = vs.explain(backbone, pixels)
    assert list(explanation.results) == ["rollout, mean of heads", "rollout, max of heads"]
    assert explanation.meanings["libra"] == "not available: the model names no class"
    assert explanation.photos[0].no_class_map == "the model names no class"
    assert (explanation.predictions, explanation.target) == ([], None)
    with pytest.raises(vs.CallError, match="no classifier"):
        vs.explain(backbone, pixels, target="dog")


@pytest.mark.slow
def test_a_model_that_classifies_by_windows_has_their_attention(chelsea: np.ndarray) -> None:
    windows = reset_classifier(vs.load("swin-nano"), ["a", "b"], by_windows=True)
    explanation = vs.explain(windows, chelsea)
    (photo,) = explanation.photos
    assert photo.window_cls is not None
    assert (explanation.results, len(explanation.predictions)) == ({}, 2)
    assert repr(explanation).startswith("<Explanation of swin-nano: window CLS tokens, predicts ")
    assert explanation.figure().axes
    with pytest.raises(vs.CallError, match="CLS tokens in its windows, which take no target"):
        vs.explain(windows, chelsea, target="a")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (["gradcam"], {}, r"^unknown method 'gradcam': choose attention, rollout, "),
        ([["libra", 3]], {}, r"^methods is \['libra', 3\]: pass the name of a method, a list of names, or a mapping"),
        ([[]], {}, r"^methods is \[\]: pass the name"),
        ([vs.libra], {}, r"^methods is <function libra.*: pass the name"),
        ([{"libra": 3}], {}, r"^the options of libra are 3: pass a mapping from names to values$"),
        ([{"libra": {"hide": "black"}}], {}, r"^libra has no option 'hide': choose variant, gamma, "),
        ([["libra", "rollout"]], {"hide": "black"}, r"^libra, rollout have no option 'hide': add one of lime, "),
        ([None], {"num_samples": 9}, r"^rollout, libra have no option 'num_samples': add one of lime, "),
        (["libra"], {"baseline": "grey"}, r"^libra has no option 'baseline': add one of lime, .*integrated_gradients$"),
        (
            [["rise", "integrated_gradients"]],
            {"hide": "drop"},
            r"^hide is 'drop', which leaves no image, but integrated_gradients needs one as the baseline: choose ",
        ),
        ([None], {"head_fusion": "min"}, r"^head_fusion is 'min', but the default maps are rollouts with the mean"),
        (["attention", "dog"], {}, r"^target is 'dog', but attention takes no target: add one of rollout, lime"),
        (["rollout", ("dog", "cat")], {}, r"^target is a contrast, but rollout takes no contrast: add one of lime"),
        (["rollout", [lambda x: x]], {}, r"^target is a function, but rollout takes no function: add one of lime"),
        (["libra", ["dog", "cat"]], {}, r"^target is a list of 2 for 1 image: pass one target for each image$"),
        ([None, "tiger"], {}, r"target 'tiger' is not a label of this model"),
        ([{"occlusion": {}}], {"hide": "purple"}, r"purple"),
        ([None], {"progress": 3}, r"^progress is 3: pass True, False, or a function"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    model: vs.VisionModel, chelsea: np.ndarray, arguments: list, options: dict, message: str
) -> None:
    with pytest.raises(vs.CallError, match=message) as caught:
        vs.explain(model, chelsea, *arguments, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("methods", [None, "lime"])
def test_an_unknown_keyword_is_a_type_error(model: vs.VisionModel, chelsea: np.ndarray, methods: str | None) -> None:
    with pytest.raises(TypeError, match=r"^explain\(\) got an unexpected keyword argument 'nonsense'$"):
        vs.explain(model, chelsea, methods, nonsense=3)


def test_mistakes_are_found_before_the_model_runs(model: vs.VisionModel, chelsea: np.ndarray, monkeypatch) -> None:
    monkeypatch.setattr(nn.Module, "__call__", lambda *_, **__: pytest.fail("the model ran"))
    for arguments, options in ((["gradcam"], {}), (["rollout", ("dog", "cat")], {}), ([], {"seed": 3})):
        with pytest.raises(vs.CallError):
            vs.explain(model, chelsea, *arguments, **options)


def test_ctrl_c_keeps_the_maps_so_far(model: vs.VisionModel, chelsea: np.ndarray, monkeypatch) -> None:
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(MaskedModel, "evaluate", interrupt)
    with pytest.warns(vs.VitscopeWarning) as caught:
        explanation = vs.explain(model, [chelsea, chelsea], ["rollout", "occlusion", "libra"])
    assert [str(warning.message) for warning in caught] == [
        "interrupted: the explanation holds the first 1 of 3 methods",
        "interrupted: the result holds the first 1 of 2 images",
    ]
    assert (len(explanation), list(explanation.results), explanation.interrupted) == (1, ["rollout"], True)
    with pytest.raises(KeyboardInterrupt):
        vs.explain(model, chelsea, ["occlusion", "rollout"])
