"""The result of vs.explain: figure, notebook, files and JSON."""

import io
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import vitscope as vs
from vitscope.views import explanations
from vitscope.views.dispatch import scene_of

pytestmark = pytest.mark.usefixtures("coarse_figures")


@pytest.fixture(scope="module")
def photo(chelsea: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "<b>cat.png"
    Image.fromarray(chelsea).save(path)
    return path


@pytest.fixture(scope="module")
def default(photo: Path) -> vs.Explanation:
    return vs.explain("vit-nano", photo, target="frog")


@pytest.fixture(scope="module")
def batch(photo: Path, chelsea: np.ndarray) -> vs.Explanation:
    return vs.explain("vit-nano", [photo, chelsea[:, ::-1]], ["libra", "rollout", "grad_cam"])


def test_the_figure_names_photo_model_and_target(default: vs.Explanation, photo: Path) -> None:
    scene = scene_of(default, None)
    top, second = default.predictions[:2]
    frog = next(p for p in default.predictions if p.label == "frog")
    assert scene.title == (
        f"What supports frog ({frog.probability:.1%}; predicted: cat, {top.probability:.1%}), "
        "and what reaches the readout of vit-nano"
    )
    assert scene.subject.startswith(
        f"{photo}; vit-nano predicts cat ({top.probability:.1%}), {second.label} ({second.probability:.1%}), "
    )
    assert scene.subject.endswith(f"; target: frog ({frog.probability:.1%})")
    assert (
        scene.note
        == "top: LibraGrad and attention rollout; below: heads of the last layer, layer 6 (index 5), query: readout"
    )
    first, *others = scene.rows
    assert [panel.title for panel in first.panels] == [
        "photo", "libra, frog", "rollout, mean of heads", "rollout, max of heads",
    ]  # fmt: skip
    heads = [panel for row in others for panel in row.panels]
    assert [panel.title for panel in heads] == [f"head {head}" for head in range(12)]
    for panel, head in zip(heads, default.photos[0].heads, strict=True):
        np.testing.assert_array_equal(panel.values, head.values[0])
        assert panel.uniform == 1 / 65


def test_the_figure_of_methods_names_what_each_explains(batch: vs.Explanation) -> None:
    scene = scene_of(batch, 1)
    top = batch[1].predictions[0]
    assert scene.title == f"What supports {top.label} ({top.probability:.1%}) for vit-nano"
    assert scene.subject.startswith("photo; vit-nano predicts ")
    maps = {panel.title: panel for panel in scene.rows[0].panels}
    assert maps["libra"].lines == ["the logit", "forward passes: 1 + a backward"]
    assert maps["rollout"].lines == ["attention, the same for every class", "forward passes: 1"]
    for name in batch[1].results:
        panel = next(panel for row in scene.rows for panel in row.panels if getattr(panel, "title", "") == name)
        np.testing.assert_array_equal(panel.values, batch[1].results[name].values[0])


def test_dropped_artefacts_are_hatched(photo: Path) -> None:
    explanation = vs.explain("vit-nano", photo, ["attention", "libra"])
    dropped = explanation.results["attention"].values > explanation.results["attention"].values.median()
    masked = replace(explanation.results["attention"], dropped=dropped)
    results = {**explanation.results, "attention": masked}
    scene = scene_of(replace(explanation, photos=[replace(explanation.photos[0], results=results)]), None)
    panels = {panel.title: panel for panel in scene.rows[0].panels}
    np.testing.assert_array_equal(panels["attention"].dropped, dropped[0])
    assert panels["libra"].dropped is None


@pytest.mark.slow
def test_it_draws_a_figure_or_into_axes(default: vs.Explanation, batch: vs.Explanation) -> None:
    assert len(default.figure().axes) > 14
    figure = Figure()
    axes, other = figure.subplots(1, 2)
    assert default.figure(axes) is figure
    assert axes.has_data()
    assert not other.has_data()
    assert isinstance(batch.figure(index=-1), Figure)
    for index in (2, -3):
        with pytest.raises(vs.CallError, match=rf"^image {index} does not exist: this explanation has images 0 to 1$"):
            batch.figure(index=index)


@pytest.mark.slow
def test_a_notebook_shows_the_figure_and_the_classes(
    default: vs.Explanation, batch: vs.Explanation, monkeypatch: Any
) -> None:
    assert Image.open(io.BytesIO(default._repr_png_())).width > 100
    page = default._repr_html_()
    assert page.count("<img ") == 1
    assert "<td>cat</td><td>73.5%</td>" in page
    assert "<td>libra</td><td>which patches raise (red) or lower (blue) the logit of frog</td>" in page
    assert "<b>cat" not in page
    page = batch._repr_html_()
    assert page.count("<img ") == page.count("<caption>Agreement") == 2
    monkeypatch.setattr(explanations, "MAX_IMAGES", 1)
    page = batch._repr_html_()
    assert page.count("<img ") == 1
    assert page.endswith("<p>… 1 more images</p>")


def test_the_repr_is_one_line(default: vs.Explanation, batch: vs.Explanation) -> None:
    assert repr(default) == (
        "<Explanation of vit-nano: libra; rollout, mean of heads; rollout, max of heads, predicts cat, target frog>"
    )
    assert repr(batch) == "<Explanation of vit-nano: 2 images, libra; rollout; grad_cam>"
    assert len(repr(default.photos[0])) <= 200


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "beginning"), [(".png", b"\x89PNG"), (".PDF", b"%PDF"), (".svg", b"<?xml"), (".html", b"<!doctype")]
)
def test_it_is_saved_in_every_format(batch: vs.Explanation, tmp_path: Path, suffix: str, beginning: bytes) -> None:
    path = tmp_path / f"figure{suffix}"
    path.write_text("older")
    assert batch.save(path, index=1) == path
    assert path.read_bytes().lower().startswith(beginning.lower())
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_the_report_holds_everything(default: vs.Explanation, tmp_path: Path) -> None:
    page = default.save(tmp_path / "report.html").read_text()
    for text in ("&lt;b&gt;cat.png", "73.5%", "rollout, max of heads", "completeness: error", "weights_sha256"):
        assert text in page
    assert "<b>cat" not in page


def test_another_suffix_is_refused(default: vs.Explanation, tmp_path: Path) -> None:
    with pytest.raises(vs.CallError, match=r"^cannot save as 'a.jpg': end the name in .png, .pdf, .svg or .html$"):
        default.save(tmp_path / "a.jpg")
    with pytest.raises(vs.CallError, match=r"^image 1 does not exist"):
        default.save(tmp_path / "a.png", index=1)
    assert list(tmp_path.iterdir()) == []


def test_a_batch_has_no_properties_of_a_single_photo(batch: vs.Explanation) -> None:
    for name in ("predictions", "results", "meanings", "agreement", "target"):
        with pytest.raises(vs.CallError, match=r"holds 2 images: take one, as in explanation\[0\]$"):
            getattr(batch, name)
        getattr(batch[0], name)
    assert [single.photos for single in batch] == [[photo] for photo in batch.photos]
    assert not batch.interrupted


def test_json_holds_predictions_and_maps(default: vs.Explanation, batch: vs.Explanation, photo: Path) -> None:
    written = json.loads(json.dumps(default.as_json(top_k=2), allow_nan=False))
    assert written["model"] == "vit-nano"
    (entry,) = written["images"]
    assert list(entry) == ["image", "predictions", "rollouts", "class_map"]
    assert (entry["image"], len(entry["predictions"]), len(entry["rollouts"])) == (str(photo), 2, 2)
    np.testing.assert_allclose(entry["class_map"]["values"], default.results["libra"].values[0])
    first, second = batch.as_json()["images"]
    assert list(first) == list(second) == ["image", "predictions", "results", "agreement"]
    assert second["results"]["grad_cam"] == batch[1].results["grad_cam"].as_json()
    with pytest.raises(vs.CallError, match="top_k is 0"):
        default.as_json(top_k=0)


def test_it_can_be_pickled(default: vs.Explanation) -> None:
    copy = pickle.loads(pickle.dumps(default))
    np.testing.assert_array_equal(copy.results["libra"].values, default.results["libra"].values)


@pytest.mark.slow
def test_the_figure_names_the_baseline_and_the_passes_of_each_method(chelsea: np.ndarray) -> None:
    methods = {
        "lime": {"segments": "slic", "num_samples": 400},
        "occlusion": {"window": 4, "stride": 4},
        "rise": {"num_samples": 5},
        "integrated_gradients": {"steps": 3},
        "transition_attention": {"steps": 3},
    }
    colour = {**methods, "rise": {"num_samples": 5, "hide": [1, 2.5, 3]}, "occlusion": {"window": 4, "hide": "drop"}}
    lines = []
    for options in (methods, colour):
        scene = scene_of(vs.explain("vit-nano", chelsea, options), None)
        maps = [panel for row in scene.rows for panel in row.panels if getattr(panel, "lines", None)]
        lines.append({panel.title: panel.lines[1:] for panel in maps})
    assert lines[0] == {
        "lime": ["forward passes: 400", "hidden: mean of each segment"],
        "occlusion": ["forward passes: 4", "hidden: mean of each patch"],
        "rise": ["forward passes: 5", "hidden: mean of the image"],
        "integrated_gradients": ["forward passes: 3 + 3 backward", "baseline: mean of the image"],
        "transition_attention": ["forward passes: 4 + 4 backward"],
    }
    assert (lines[1]["rise"][1], lines[1]["occlusion"][1]) == ("hidden: 1, 2.5, 3", "hidden: left out")
