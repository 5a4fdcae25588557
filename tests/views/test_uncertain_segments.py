"""Segments whose interval holds zero are pale, fits are judged on held-out samples, improbable classes say so."""

import dataclasses
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image

import vitscope as vs
from tests.helpers.lime import blocks, shrunk
from vitscope.cli.tables import print_segments
from vitscope.results.colours import PALE
from vitscope.views import figure, scene, segments
from vitscope.views.legends import legends_of
from vitscope.views.report import numbers_of

WEIGHTS = [0.5, -0.5, 0.25, -0.25]
INTERVALS = [(0.4, 0.6), (-1.0, 0.1), (0.0, 0.5), (-0.3, -0.2)]  # the second and the third hold zero


@pytest.fixture(scope="module", name="result")
def lime_result() -> vs.SegmentAttribution:
    """Return a result of four quarters over a white photo."""
    photo = shrunk("chelsea", (60, 40))
    white = vs.InputImage.from_photo(Image.new("RGB", (60, 40), "white"))
    quarters = np.repeat(np.repeat(np.array([[0, 1], [2, 3]]), 20, 0), 30, 1)
    result = vs.lime(vs.load("vit-nano"), photo, target="cat", num_samples=60, segments=quarters)
    return dataclasses.replace(with_weights(result, INTERVALS), images=[white])


def with_weights(result: vs.SegmentAttribution, intervals: Any) -> vs.SegmentAttribution:
    (image,) = result.segmented_images
    limits = None if intervals is None else torch.tensor(intervals, dtype=torch.float64, device="cpu")
    weights = torch.tensor(WEIGHTS, dtype=torch.float64, device="cpu")
    fit = dataclasses.replace(image.fits[0], weights=weights, intervals=limits)
    image = dataclasses.replace(image, fits=[fit])
    return dataclasses.replace(result, values=image.values(), segmented_images=[image])


def quarters_of(picture: Image.Image) -> np.ndarray:
    """Return the colours in the middle of the four quarters."""
    width, height = picture.size
    pixels = np.asarray(picture)
    return np.array([pixels[height * y // 4, width * x // 4] for y in (1, 3) for x in (1, 3)])


def test_undecided_weights_are_those_whose_interval_holds_zero(result: vs.SegmentAttribution) -> None:
    assert result.undecided.tolist() == [False, True, True, False]
    pale = result.pale_pixels()
    assert [bool(pale[y, x]) for y in (5, 35) for x in (5, 55)] == [False, True, True, False]
    touching = with_weights(result, [(0.0, 1.0), (-1.0, 0.0), (1e-9, 1.0), (-1.0, -1e-9)])
    assert touching.undecided.tolist() == [True, True, False, False]


def test_pale_segments_have_a_quarter_of_the_colour(result: vs.SegmentAttribution) -> None:
    panel = segments.pixel_panel(result, "map")
    colours = mpl.colormaps["RdBu_r"](np.array([1.0, 0.0, 0.75, 0.25]))[:, :3] * 255
    expected = colours.copy()
    expected[1:3] = 255 - PALE * (255 - colours[1:3])
    for picture in (result.overlay(1.0), figure.render(dataclasses.replace(panel, alpha=1.0), (120, 80))):
        np.testing.assert_allclose(quarters_of(picture), expected, atol=2)


def test_maps_without_intervals_have_no_pale_parts(result: vs.SegmentAttribution) -> None:
    bare = with_weights(result, None)
    assert bare.undecided is None
    assert bare.pale_pixels() is None
    assert segments.pixel_panel(bare, "map").pale is None
    colours = mpl.colormaps["RdBu_r"](np.array([1.0, 0.0, 0.75, 0.25]))[:, :3] * 255
    np.testing.assert_allclose(quarters_of(bare.overlay(1.0)), colours, atol=2)
    assert scene.PALE_CAPTION not in legend_of(segments.supporting_regions(bare))
    rollout = vs.rollout(vs.load("vit-nano"), np.zeros((40, 60, 3), np.uint8))
    assert rollout.pale_pixels() is None


def legend_of(content: scene.Scene) -> str:
    return " ".join(legend.caption for legend in legends_of(content, [3.0] * len(content.rows)))


def test_the_legend_says_what_pale_means(result: vs.SegmentAttribution) -> None:
    assert scene.PALE_CAPTION == "pale: interval holds 0"
    assert legend_of(segments.supporting_regions(result)).endswith("; pale: interval holds 0")
    certain = with_weights(result, [(0.4, 0.6), (-0.6, -0.4), (0.2, 0.3), (-0.3, -0.2)])
    assert "pale" not in legend_of(segments.supporting_regions(certain))
    rise = vs.rise(vs.load("vit-nano"), shrunk("chelsea", (60, 40)), num_samples=9)
    mixed = segments.side_by_side([result, dataclasses.replace(rise, images=result.images)], "ab", title="")
    unsigned, signed = legends_of(mixed, [3.0])
    assert ("pale" in signed.caption, "pale" in unsigned.caption) == (True, False)
    assert signed.ends == ("opposes", "supports")


def test_axes_of_the_caller_say_what_pale_means(result: vs.SegmentAttribution) -> None:
    axes = mpl.figure.Figure().subplots()
    result.figure(axes)
    assert "pale: interval holds 0" in axes.texts[-1].get_text()


def test_bars_whose_interval_holds_zero_are_pale(result: vs.SegmentAttribution) -> None:
    axes = mpl.figure.Figure().subplots()
    content = segments.supporting_regions(result)
    figure.draw_on_axes(content.rows[1].panels[2], axes)
    opacity = {text: round(bar.get_alpha(), 2) for text, bar in zip("12ab", axes.patches, strict=True)}
    assert opacity == {"1": 0.85, "2": 0.3, "a": 0.3, "b": 0.85}


def test_bars_of_tiny_weights_have_digits_and_fill_the_axes() -> None:
    axes = mpl.figure.Figure().subplots()
    figure.draw_on_axes(scene.Bars(["a", "b"], [2.5e-13, -1e-13]), axes)
    assert [text.get_text() for text in axes.texts if text.get_text()[0] in "+−"] == ["+2.50e−13", "−1.00e−13"]
    low, high = axes.get_xlim()
    assert -1e-12 < low < -1e-13
    assert 2.5e-13 < high < 1e-12


def test_the_table_marks_them(result: vs.SegmentAttribution, capsys: pytest.CaptureFixture[str]) -> None:
    print_segments(result, 5)
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert {name: "holds 0" in line for name, line in rows.items()} == {"1": False, "2": True, "a": True, "b": False}
    assert "+0.500  +0.400 to +0.600" in " ".join(rows["1"].split(" ")).replace("   ", "  ")


def test_the_fit_is_judged_on_held_out_samples(result: vs.SegmentAttribution) -> None:
    (image,) = result.segmented_images
    for score, text in ((0.4151, "0.42"), (-0.2, "−0.20"), (None, "not determined")):
        fit = dataclasses.replace(image.fits[0], score=0.98, held_out_score=score)
        judged = dataclasses.replace(result, segmented_images=[dataclasses.replace(image, fits=[fit])])
        assert f"R² on held-out samples: {text}" in segments.supporting_regions(judged).note
        assert "0.98" not in segments.supporting_regions(judged).note
        numbers = {name: value for _, name, value in numbers_of("lime", judged)}
        assert numbers["R² of the linear fit on its own samples"] == "0.980"
        assert numbers["R² of the linear fit on held-out samples"] == (
            "not determined" if score is None else f"{score:.3f}"
        )


METHODS: dict[str, Any] = {
    "lime": (vs.lime, {"num_samples": 60, "segments": blocks(40, 60, 20)}),
    "kernel_shap": (vs.kernel_shap, {"num_samples": 60, "segments": blocks(40, 60, 20)}),
    "rise": (vs.rise, {"num_samples": 10}),
    "occlusion": (vs.occlusion, {"window": 4}),
}


@pytest.mark.parametrize("name", METHODS)
def test_an_improbable_class_has_the_advice_to_explain_its_logit(name: str) -> None:
    method, options = METHODS[name]
    model, photo = vs.load("vit-nano"), shrunk("chelsea", (60, 40))
    likely, *_, unlikely = model.predict(photo, top_k=10)[0]
    assert unlikely.probability < 0.01 < likely.probability
    result = method(model, photo, **options)
    assert segments.logit_advice([result]) == ""
    other = result.of(unlikely.label)
    advice = segments.logit_advice([result, other])
    assert advice == segments.logit_advice([other]) != ""
    assert advice.startswith(f"; {unlikely.label} has a probability of 0.")
    assert "output='logit' (--output logit) is the better thing to explain" in advice
    assert segments.side_by_side([result, other], "ab", title="").note.endswith(advice.removeprefix("; "))
    assert segments.logit_advice([method(model, photo, target=unlikely.index, output="logit", **options)]) == ""
    assert segments.logit_advice([result.of((likely.label, unlikely.label))]) == ""
    assert segments.logit_advice([vs.rollout(model, photo)]) == ""
