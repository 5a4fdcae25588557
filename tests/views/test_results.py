"""Results show themselves: figures, and pictures and tables in notebooks, for every class of results."""

import io
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import vitscope as vs
from tests.helpers.comparisons import leaking, synthetic_comparison
from tests.results.test_saved_results import plain, segmented
from vitscope.compositing.effects import Effect, Effects
from vitscope.compositing.ranking import SizeCurve
from vitscope.tune.run_folder import Tuned
from vitscope.views import page, results
from vitscope.views.dispatch import scene_of
from vitscope.views.figure import draw

pytestmark = pytest.mark.usefixtures("quick_comparisons", "coarse_figures")

BOX = {"cat": (105, 20, 235, 200)}


@pytest.fixture(scope="module")
def model() -> vs.VisionModel:
    return vs.load("vit-nano")


@pytest.fixture(scope="module")
def trace(model: vs.VisionModel, chelsea: np.ndarray) -> vs.Trace:
    return vs.capture(model, [chelsea, chelsea[:, ::-1]])


@pytest.fixture(scope="module")
def composition(model: vs.VisionModel, chelsea: np.ndarray) -> vs.Composition:
    return vs.compose(model, chelsea, BOX, tests=("size", "location"), places=2, scales=[0.5, 1])


@pytest.fixture(scope="module")
def shown(
    model: vs.VisionModel,
    trace: vs.Trace,
    composition: vs.Composition,
    chelsea: np.ndarray,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """Return a result of every class, by the name of the class or of the function."""
    rollout, libra = vs.rollout(trace), vs.libra(model, chelsea)
    single = rollout[0]
    comparison = synthetic_comparison()
    record = {**comparison.cells[0].record, "labels": ["a", "b"], "recipe": {"validation": 0.0}}
    return {
        "rollout": rollout,
        "libra": libra,
        "lime": vs.lime(model, chelsea, segments="patches", num_samples=80),
        "Trace": trace,
        "HeadImportance": vs.head_importance(model, chelsea, by="gradient"),
        "HeadStatistics": vs.head_statistics(trace),
        "Artefacts": vs.artefact_tokens(model, chelsea),
        "Composition": composition,
        "location map": composition.location_map("cat"),
        "Agreement": vs.agreement([single, libra]),
        "Faithfulness": vs.Faithfulness(*(np.array([0.1, 0.3]) for _ in range(4))),
        "RegionShares": vs.region_shares(libra, {"cat": BOX["cat"], "edge": "border"}, draws=50),
        "mean maps": vs.mean_maps(rollout, ["cat", "mirrored cat"]),
        "Effects": Effects([Effect("object", np.array([0.1]), 0.1, None, None)]),
        "AttentionChange": vs.AttentionChange((0.1, 0.2), None, None, None, None, None),
        "Comparison": comparison,
        "Tuned": Tuned(model, Path("run"), record, np.zeros(40, int)),
        "DataCheck": leaking(tmp_path_factory.mktemp("data")),
        "WindowCls": vs.window_cls(vs.load("swin-nano"), chelsea),
    }


DRAWN = (
    "rollout", "libra", "lime", "Trace", "HeadImportance", "Artefacts", "Composition", "location map",
    "AttentionChange", "Tuned", "DataCheck", "WindowCls", "mean maps",
)  # fmt: skip
TABLES = ("Agreement", "Faithfulness", "Effects", "HeadStatistics", "RegionShares", "Comparison")


def pixels(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DRAWN, "Comparison"])
def test_a_result_has_a_figure_of_its_own(name: str, shown: dict[str, Any]) -> None:
    figure = shown[name].figure()
    assert isinstance(figure, Figure)
    assert figure.axes


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DRAWN, "Comparison"])
def test_a_result_is_drawn_into_axes(name: str, shown: dict[str, Any]) -> None:
    figure = Figure(figsize=(6, 3))
    axes, other = figure.subplots(1, 2)
    assert shown[name].figure(axes) is figure
    assert axes.has_data()
    assert not other.has_data()


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_a_notebook_shows_a_picture_of_limited_size(name: str, shown: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(page, "MAX_SIDE", 300)
    assert 50 < max(pixels(shown[name]._repr_png_()).size) <= 300
    assert not hasattr(shown[name], "_repr_html_")


@pytest.mark.parametrize("name", TABLES)
def test_a_notebook_shows_a_table(name: str, shown: dict[str, Any]) -> None:
    table = shown[name]._repr_html_()
    assert table.startswith("<table><caption>")
    assert table.count("<tr>") >= 2
    assert len(table) < 10_000
    assert not hasattr(shown[name], "_repr_png_")


@pytest.mark.parametrize("name", [*DRAWN, *TABLES])
def test_every_repr_is_one_short_line(name: str, shown: dict[str, Any]) -> None:
    text = repr(shown[name]) if name != "Effects" else repr(shown[name][0])
    assert len(text) <= 200
    assert "\n" not in text
    assert text.startswith("<")
    assert "tensor" not in text
    assert "array" not in text


def test_reprs_of_parts_are_short(composition: vs.Composition) -> None:
    curve = SizeCurve("cat", "dog", np.array([0.5, 1]), np.array([0.1, 0.4]), np.array([0.2, 0.3]))
    assert repr(curve) == "<SizeCurve of dog by the size of cat: 2 sizes of scale 0.5 to 1, 0.2 to 0.3>"
    assert repr(composition.objects["cat"]) == "<ObjectMask cat: 34.7% of the photo, box (105, 20, 235, 200)>"


def test_the_figure_of_a_batch_shows_its_images(trace: vs.Trace, monkeypatch: Any) -> None:
    rollout = vs.rollout(trace)
    scene = scene_of(rollout, None)
    maps = [panel for row in scene.rows for panel in row.panels if panel.values is not None]
    for panel, values in zip(maps, rollout.values, strict=True):
        np.testing.assert_array_equal(panel.values, values.numpy())
    (pair,) = scene_of(rollout, -1).rows
    np.testing.assert_array_equal(pair.panels[1].values, rollout.values[1].numpy())
    monkeypatch.setattr(results, "MAX_IMAGES", 1)
    assert scene_of(rollout, None).note.endswith("; 1 of 2 images")


def test_a_figure_names_method_model_and_target(shown: dict[str, Any]) -> None:
    assert scene_of(shown["libra"], None).title == "Libra of vit-nano, for cat"
    assert scene_of(shown["rollout"], 0).title == "Rollout of vit-nano"
    assert scene_of(shown["rollout"], 0).note == "head fusion: mean; 1 of 2 images"


@pytest.mark.parametrize("result", [plain(), segmented()], ids=["patches", "segments"])
def test_a_loaded_result_is_drawn_without_its_photo(result: vs.Attribution, tmp_path: Path) -> None:
    loaded = type(result).load(result.save(tmp_path / "map.safetensors"))
    (panel, *_) = [panel for row in scene_of(loaded, 0).rows for panel in row.panels]
    np.testing.assert_array_equal(panel.values, result.values[0])
    assert loaded.figure().axes
    assert loaded._repr_png_()


@pytest.mark.parametrize("index", [2, -3, True])
def test_a_missing_image_is_refused(index: Any, trace: vs.Trace) -> None:
    rollout = vs.rollout(trace)
    for result in (rollout, trace):
        with pytest.raises(vs.CallError, match=r"^index is .*"):
            result.figure(index=index)


def test_an_index_without_a_batch_is_refused(shown: dict[str, Any]) -> None:
    for name in ("Composition", "Tuned", "DataCheck", "Comparison", "AttentionChange"):
        with pytest.raises(vs.CallError, match=rf"^index is 0: the figure of a {name} is not of a single image$"):
            shown[name].figure(index=0)


def test_what_is_not_axes_is_refused() -> None:
    with pytest.raises(vs.CallError, match=r"^axes is 3: pass matplotlib Axes, or nothing for a new figure$"):
        plain().figure(3)


def test_a_result_that_cannot_be_drawn_shows_its_text(trace: vs.Trace) -> None:
    unknown = replace(trace, readout=None)
    assert unknown._repr_png_() is None
    with pytest.raises(vs.VitscopeError):
        unknown.figure()


def test_texts_in_tables_are_escaped(shown: dict[str, Any]) -> None:
    hostile = replace(shown["Agreement"], names=["<script>alert(1)</script>", "a\x1b[31m & b"])
    table = hostile._repr_html_()
    assert "<script>" not in table
    assert "&lt;script&gt;" in table
    assert "\x1b" not in table


def test_a_figure_is_saved_and_pickled(trace: vs.Trace, tmp_path: Path) -> None:
    figure = vs.rollout(trace).figure()
    figure.savefig(tmp_path / "map.pdf")
    assert (tmp_path / "map.pdf").read_bytes().startswith(b"%PDF")
    assert pickle.loads(pickle.dumps(figure))._repr_png_().startswith(b"\x89PNG")


@pytest.mark.slow
def test_drawing_leaves_pyplot_alone() -> None:
    code = """
import sys, torch, vitscope as vs
from PIL import Image
image = vs.InputImage.from_photo(Image.new("RGB", (30, 30)))
result = vs.Attribution(torch.rand(1, 3, 3), vs.Grid(3, 3), [image])
assert "vitscope.views" not in sys.modules
result.figure(), result._repr_png_()
print("matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr


def test_the_picture_of_a_map_is_that_of_the_command_line(trace: vs.Trace) -> None:
    """The figure of a trace is the scene of ``vitscope attention --layer``, pixel for pixel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from vitscope.views.windows import attention_scene

    def picture(figure: Figure) -> np.ndarray:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba()).copy()

    expected = picture(draw(attention_scene(trace, 5, "readout", index=1)))
    np.testing.assert_array_equal(picture(trace.figure(index=1)), expected)


def has_display(value: Any) -> bool:
    return any(hasattr(value, name) for name in ("_repr_png_", "_repr_html_"))


def test_every_public_result_shows_itself() -> None:
    """A new result class has to be drawn or tabulated, or be listed here with a short text."""
    texts = {
        "AttentionStep", "Data", "DataOptions", "Effect", "EditedImage", "Grid", "InputImage", "Layout", "MergeStep",
        "ObjectMask", "Placement", "Prediction", "Progress", "Recipe", "RegionShare", "SimilarTo", "VisionModel",
        "WindowHead",
    }  # fmt: skip
    classes = {
        name
        for name in vs.__all__
        if isinstance(getattr(vs, name), type) and not issubclass(getattr(vs, name), BaseException)
    }
    assert {name for name in classes if not has_display(getattr(vs, name))} == texts
