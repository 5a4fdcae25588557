"""Numbers at the ends of colours, the notes below maps, and the legends at the foot of a figure."""

import numpy as np
import pytest
from PIL import Image

import vitscope as vs
from vitscope.results.colours import COLORMAP, SIGNED_COLORMAP
from vitscope.views import figure
from vitscope.views.legends import Legend, legends_of, scale_ends
from vitscope.views.scene import SIGNED_CAPTION, UNSIGNED_CAPTION, Panel, Row, Scene

IMAGE = vs.InputImage.from_photo(Image.new("RGB", (60, 60), "grey"))
RAMP = np.linspace(1, 2, 400, dtype=np.float32).reshape(20, 20) / 401
OUTLIER = np.where(RAMP.max() == RAMP, 50 / 401, RAMP).astype(np.float32)
FLAT = np.linspace(1, 1.05, 400, dtype=np.float32).reshape(20, 20) / 401


def scene(*panels: Panel, width: float = 3.0, caption: str = UNSIGNED_CAPTION) -> Scene:
    return Scene([Row(panels, len(panels), width)], "title", caption=caption)


def texts(content: Scene) -> list[str]:
    return [text.get_text() for text in figure.draw(content).texts if text.get_text()]


def test_attention_is_in_multiples_of_uniform_attention() -> None:
    assert scale_ends(Panel(IMAGE, RAMP, uniform=1 / 401)) == ("1", "2", " × uniform")
    assert texts(scene(Panel(IMAGE, RAMP, uniform=1 / 401)))[-2:] == ["2 × uniform", UNSIGNED_CAPTION]
    assert scale_ends(Panel(IMAGE, RAMP)) == ("0.0025", "0.005", "")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1e-9, 50.0], ("0", "50")),
        ([0.62, 0.65], ("0.62", "0.65")),
        ([-3.0, 1.0], ("−3", "1")),
        ([0.0, 412], ("0", "412")),
    ],
)
def test_the_numbers_are_short(values: list[float], expected: tuple[str, str]) -> None:
    assert scale_ends(Panel(IMAGE, np.array([values], dtype=np.float32)))[:2] == expected


def test_a_signed_map_has_a_symmetric_scale_with_its_ends_named() -> None:
    panel = Panel(IMAGE, np.array([[-0.25, 1.0]], dtype=np.float32), signed=True)
    assert scale_ends(panel) == ("−1.0", "+1.0", "")
    written = texts(scene(panel))
    assert "opposes −1.0" in written
    assert "+1.0 supports" in written
    assert {"opposes", "supports", SIGNED_CAPTION} <= set(written)


def test_a_figure_with_signed_and_unsigned_maps_has_both_legends() -> None:
    mixed = scene(Panel(IMAGE, RAMP), Panel(IMAGE, RAMP - RAMP.mean(), signed=True))
    assert legends_of(mixed, [3.0]) == [
        Legend(UNSIGNED_CAPTION, COLORMAP),
        Legend(SIGNED_CAPTION, SIGNED_COLORMAP, ("opposes", "supports")),
    ]
    assert legends_of(scene(Panel(IMAGE)), [3.0]) == [Legend(UNSIGNED_CAPTION, COLORMAP)]
    assert legends_of(scene(Panel(IMAGE, RAMP), caption=""), [3.0]) == []


def test_what_lies_beyond_the_scale_is_said_below_the_map() -> None:
    written = texts(scene(Panel(IMAGE, OUTLIER, uniform=1 / 401), width=4.0))
    assert "2 of 400 patches lie beyond the scale: up to 33 × the median" in written
    assert f"{UNSIGNED_CAPTION}, unless noted" in written
    flat = texts(scene(Panel(IMAGE, FLAT, uniform=1 / 401), width=4.0))
    assert "nearly the same everywhere: highest 1.05 × lowest" in flat
    assert {"0", "2 × uniform"} <= set(flat)


def test_notes_of_small_maps_are_at_the_foot_of_the_figure() -> None:
    clipped, even = (Panel(IMAGE, values, "head 0", uniform=1 / 401) for values in (OUTLIER, FLAT))
    written = texts(scene(clipped, width=1.0))
    assert "head 0: 2 of 400 patches lie beyond the scale: up to 33 × the median" in written
    assert not any("× uniform" in text for text in written)
    summary = "maps with a few patches beyond the scale: 3, nearly or exactly flat: 1"
    assert summary in texts(scene(*[clipped] * 3, even, width=1.0))


def test_a_shared_scale_has_no_numbers_of_its_own() -> None:
    panel = Panel(IMAGE, OUTLIER, limits=(0.0, 1.0))
    assert panel.scale.limits == (0.0, 1.0)
    assert texts(scene(panel)) == ["title", UNSIGNED_CAPTION]


def test_texts_below_a_map_stay_within_its_panel() -> None:
    drawn = figure.draw(
        scene(*[Panel(IMAGE, OUTLIER * sign, signed=sign < 0, uniform=1 / 401) for sign in (1, -1)], width=1.5)
    )
    drawn.canvas.draw()
    panels = [axes.get_window_extent() for axes in drawn.axes if axes.get_label() != "colour bar"]
    notes = [
        text.get_window_extent() for text in drawn.texts if "scale" in text.get_text() and "each" not in text.get_text()
    ]
    assert notes
    for note in notes:
        assert any(panel.x0 - 1 <= note.x0 and note.x1 <= panel.x1 + 8 for panel in panels)
