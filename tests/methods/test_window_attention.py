"""Window attention: a known pattern appears at its position, and figures show the values of their titles."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vitscope as vs
from tests.cli.test_app import run
from tests.helpers.command_line import printed_results
from tests.helpers.swin_families import MAXVIT, SIZES, SwinFamily, family, pixels
from vitscope.methods.window_attention import is_shifted, region_queries, window_regions
from vitscope.views import figure, windows

FIRST = [family("transformers-swin"), family("timm-swin"), family("torchvision-swin")]
every_first = pytest.mark.parametrize("swin", FIRST, ids=lambda swin: swin.name)


def disc(side: int = 16, patch: int = 2) -> tuple[Tensor, Tensor]:
    """Return an image of a bright disc off the centre, pixels ±1, and a mask of the bright patches."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    bright = (rows - 6) ** 2 + (columns - 9) ** 2 <= 20
    values = (bright.float() * 2 - 1).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    return values.expand(1, 3, -1, -1), bright


@torch.no_grad()
def attend_by_brightness(model: vs.VisionModel) -> None:
    """Make the first block add nothing, and a patch of the second attend uniformly to patches of its own brightness."""
    for name, parameter in model.module.named_parameters():
        if "bias" in name:  # biases and the tables of relative positions
            parameter.zero_()
    first, second = list(model.layout.hierarchy.blocks.values())[:2]
    first.projection.out.weight.zero_()
    mlp = first.module.mlp
    (mlp.fc2 if hasattr(mlp, "fc2") else mlp[3]).weight.zero_()
    if hasattr(second.projection.norm, "weight"):
        second.projection.norm.weight.fill_(1.0)
    for layer in second.projection.inputs:
        weight = torch.eye(16) * 3
        layer.weight.copy_(weight if len(layer.weight) == 16 else weight.repeat(3, 1))


@pytest.mark.slow
@every_first
def test_patches_of_a_shifted_block_attend_within_their_own_window(swin: SwinFamily) -> None:
    model = swin.model()
    attend_by_brightness(model)
    image, bright = disc()
    trace = vs.capture(model, image)
    # Windows of 4 shifted by 2, divided where they wrap around: rows 0-1, 2-5, …, 14-15.
    window = (torch.arange(16) + 2) // 4
    for row in range(16):
        for column in range(16):
            together = (window[:, None] == window[row]) & (window[None, :] == window[column])
            seen = together & (bright == bright[row, column])
            values = trace.map(1, "mean", (row, column))[0]
            torch.testing.assert_close(values, seen / seen.sum(), atol=1e-4, rtol=0)


@pytest.mark.slow
@every_first
def test_one_query_per_window_covers_the_image(swin: SwinFamily) -> None:
    trace = vs.capture(swin.model(), pixels(SIZES["fitting"]))
    for layer, regions in ((0, 16), (1, 25), (2, 4), (3, 9), (4, 1)):
        result = vs.window_attention(trace, layer=layer, head=1)
        queries = result.provenance["queries"]
        assert len(queries) == regions
        expected = sum(trace.map(layer, 1, tuple(query)) for query in queries)
        torch.testing.assert_close(result.values, expected)
        torch.testing.assert_close(result.values.sum((1, 2)), torch.full((2,), float(regions)), atol=1e-3, rtol=0)


def test_regions_are_windows_divided_where_they_wrap_around() -> None:
    trace = vs.capture(family("timm-swin").model(), pixels(SIZES["fitting"]))
    for layer, shift in ((0, 0), (1, 2)):
        window = (np.arange(16) + shift) // 4
        expected = window[:, None] * 10 + window[None, :]
        regions = window_regions(trace.step(layer))
        pairs = set(zip(regions.ravel().tolist(), expected.ravel().tolist(), strict=True))
        assert len(pairs) == len(np.unique(regions)) == len(np.unique(expected))
        assert is_shifted(trace.step(layer)) == bool(shift)


@pytest.mark.parametrize(("place", "expected"), [((0.0, 0.0), (0, 0)), ((1.0, 1.0), (2, 3)), ((0.5, 0.5), (1, 1))])
def test_the_place_of_a_query_is_relative_to_its_region(place: Any, expected: tuple[int, int]) -> None:
    assert region_queries(np.zeros((3, 4), dtype=int), place) == [expected]


def test_places_outside_a_window_are_refused() -> None:
    with pytest.raises(vs.CallError, match=r"place is 2\.0"):
        region_queries(np.zeros((3, 4), dtype=int), (2.0, 0.0))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["padded", "odd"])
@every_first
def test_shifted_blocks_are_recognised_on_grids_that_need_padding(swin: SwinFamily, kind: str) -> None:
    trace = vs.capture(swin.model(SIZES[kind]), pixels(SIZES[kind]))
    assert [is_shifted(step) for step in trace.blocks[:4]] == [False, True, False, True]
    assert windows.shift_effect(trace, 0, (2, 2)).row_names == ["1 (0)", "2 (1)"]


@pytest.mark.slow
def test_windows_that_are_spread_over_the_image_are_refused() -> None:
    trace = vs.capture(MAXVIT.model((64, 64)), pixels((64, 64)))
    spread = next(step for step in trace.blocks if ".attn_grid" in step.module)
    with pytest.raises(
        vs.UnsupportedModelError, match="spread over the image: use attention_map with a patch as query"
    ):
        vs.window_attention(trace, layer=spread.layer)
    panels = windows.query_heads(trace, spread.layer, (3, 1)).rows[0].panels
    np.testing.assert_array_equal(panels[1].values, trace.map(spread.layer, "mean", (3, 1))[0].numpy())
    assert figure.draw(windows.block_grid(trace, (0, 0)))


def test_a_plain_transformer_has_no_windows(folder) -> None:
    trace = vs.capture(vs.load(folder), torch.zeros(1, 3, 32, 32))
    with pytest.raises(vs.UnsupportedModelError, match="over all tokens at once"):
        vs.window_attention(trace)


@pytest.fixture(name="trace")
def trace_of_a_swin() -> vs.Trace:
    return vs.capture(family("torchvision-swin").model(), pixels(SIZES["fitting"], 1))


def test_the_windows_figure_has_the_mean_and_every_head(trace: vs.Trace) -> None:
    scene = windows.window_heads(trace, 1)
    panels = [panel for row in scene.rows for panel in row.panels]
    assert [panel.title for panel in panels[1:]] == ["mean of heads", "head 0", "head 1"]
    assert all(len(panel.marks) == panel.regions.max() + 1 == 25 for panel in panels)
    np.testing.assert_array_equal(panels[3].values, vs.window_attention(trace, layer=1, head=1).values[0])
    assert "layer 2 (index 1) in stage 1 (index 0), shifted, 16 × 16 patches" in scene.title


def test_stages_are_counted_even_if_only_some_layers_are_captured() -> None:
    trace = vs.capture(family("torchvision-swin").model(), pixels(SIZES["fitting"], 1), layers=[2, -1])
    assert [[step.layer for step in stage] for stage in trace.stages] == [[], [2], [5]]
    assert "layer 3 (index 2) in stage 2 (index 1), 8 × 8 patches" in windows.window_heads(trace, 2).title
    assert [len(row.panels) for row in windows.block_grid(trace).rows] == [1, 1]


@pytest.mark.parametrize("layer", [2, 3])
def test_the_shifted_partner_is_the_other_block_of_the_pair(trace: vs.Trace, layer: int) -> None:
    scene = windows.shift_effect(trace, layer, (3, 4))
    assert scene.row_names == ["3 (2)", "4 (3)"]
    np.testing.assert_array_equal(scene.rows[1].panels[1].values, trace.map(3, "mean", (3, 4))[0])
    assert [row.panels[0].regions.max() + 1 for row in scene.rows] == [4, 9]


def test_a_block_without_a_shifted_partner_is_refused(trace: vs.Trace) -> None:
    with pytest.raises(vs.CallError, match="layer 5 has no shifted partner"):
        windows.shift_effect(trace, 5, (0, 0))


def test_the_grid_of_blocks_has_one_row_per_stage(trace: vs.Trace) -> None:
    scene = windows.block_grid(trace)
    assert [[panel.values.shape for panel in row.panels] for row in scene.rows] == [[(n, n)] * 2 for n in (16, 8, 4)]
    assert [panel.title for panel in scene.rows[0].panels] == ["layer 1 (index 0)", "layer 2 (index 1), shifted"]


def test_stage_evolution_shows_the_rollout_after_each_stage(trace: vs.Trace) -> None:
    results = vs.rollout_evolution(trace)
    panels = windows.stage_evolution(trace, results).rows[0].panels
    assert [panel.title for panel in panels] == [
        "photo",
        *(f"after stage {number} (index {number - 1})" for number in (1, 2, 3)),
    ]
    for panel, end in zip(panels[1:], (1, 3, 5), strict=True):
        np.testing.assert_array_equal(panel.values, results[end].values[0])


def test_the_cls_figure_includes_mean_attention_and_rollout() -> None:
    model, images = family("torchvision-swin").model(), pixels(SIZES["fitting"], 1)
    result, rollout = vs.window_cls(model, images), vs.rollout(model, images)
    photo, cls, mean, rolled = windows.cls_comparison(result, rollout, 1).rows[0].panels
    assert photo.values is None
    np.testing.assert_array_equal(cls.values, result.map(1)[0])
    np.testing.assert_array_equal(mean.values, result.trace.map(1)[0])
    np.testing.assert_array_equal(rolled.values, rollout.values[0])
    rows = windows.cls_grid(result).rows
    assert [len(row.panels) for row in rows] == [3, 2, 2]
    assert (rows[0].panels[0].title, rows[0].panels[0].values) == ("photo", None)


def test_outlines_follow_the_borders_of_the_windows() -> None:
    """The figure of four windows is red on their borders and around the mark only."""
    from PIL import Image

    from vitscope.views.scene import Panel, Row, Scene

    image = vs.InputImage(Image.new("RGB", (40, 20), "black"), (0.0, 0.0, 40.0, 20.0))
    regions = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]])
    drawn = figure.draw(Scene([Row([Panel(image, regions=regions, marks=[(3, 0)])], 1)], "title"))
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    page = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    box = drawn.axes[0].get_position()
    height, width = page.shape[:2]
    rows = slice(round((1 - box.y1) * height), round((1 - box.y0) * height))
    panel = page[rows, round(box.x0 * width) : round(box.x1 * width)]
    red = (panel[..., 0] > 150) & (panel[..., 1] < 90)
    h, w = red.shape
    assert red[h // 2 - 2 : h // 2 + 3, w // 5].any(), "between upper and lower windows"
    assert red[h // 5, w // 2 - 2 : w // 2 + 3].any(), "between left and right windows"
    assert red[3 * h // 4 - 2 : 3 * h // 4 + 3, w // 8].any(), "above the mark"
    assert not red[h // 8 : 3 * h // 8, w // 16 : 7 * w // 16].any(), "inside a window without a mark"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["attention"],
        ["attention", "--layer", "1"],
        ["attention", "--layer", "7"],
        ["attention", "--layer", "0", "--query", "7,9"],
        ["attention", "--layer", "2", "--query", "3,4", "--shifted"],
        ["attention", "--query", "10,13"],
        ["attention", "--window-cls"],
        ["attention", "--layer", "-3", "--window-cls"],
        ["rollout", "--merge", "norm", "--target", "cat"],
        ["rollout", "--stages"],
        ["explain"],
    ],
    ids=" ".join,
)
def test_each_command_takes_a_swin(tmp_path, chelsea, capsys, monkeypatch, arguments: list[str]) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.fromarray(chelsea).save("cat.png")
    code, out, err = run(capsys, monkeypatch, arguments[0], "cat.png", "--model", "swin-nano", *arguments[1:], "--json")
    assert (code, err) == (0, "")
    (entry,) = printed_results(out)
    with Image.open(entry["figure"]) as image:
        assert image.width > 900


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["attention", "--shifted"], "--shifted compares one query in two layers"),
        (["attention", "--layer", "7", "--query", "0,0", "--shifted"], "layer 7 has no shifted partner"),
        (["attention", "--query", "16,0"], "lies outside the grid of 16 rows"),
        (["attention", "--window-cls", "--query", "1,1"], "leave out --query"),
        (["attention", "--window-cls", "--shifted", "--layer", "0", "--query", "1,1"], "pass one of them"),
        (["rollout", "--stages", "--evolution"], "pass one of them"),
        (["rollout", "--target", "kat"], "target 'kat' is not a label of this model: did you mean cat"),
        (["attention", "--model", "vit-nano", "--window-cls"], "no windows that a CLS token can enter"),
    ],
    ids=str,
)
def test_a_mistake_is_reported_in_one_line(
    tmp_path, chelsea, capsys, monkeypatch, arguments: list[str], line: str
) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.fromarray(chelsea).save("cat.png")
    model = [] if "--model" in arguments else ["--model", "swin-nano"]
    code, _, err = run(capsys, monkeypatch, arguments[0], "cat.png", *model, *arguments[1:])
    assert code == 2
    assert line in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_the_json_of_a_layer_holds_the_values_of_its_figure(tmp_path, chelsea, capsys, monkeypatch) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.fromarray(chelsea).save("cat.png")
    _, out, _ = run(capsys, monkeypatch, "attention", "cat.png", "--model", "swin-nano", "--layer", "3", "--json")
    values = printed_results(out)[0]["values_mean_of_heads"]["3"]
    expected = vs.window_attention(vs.load("swin-nano"), chelsea, layer=3).values[0]
    np.testing.assert_allclose(values, expected, atol=1e-6)


def test_distances_are_in_finest_patches_after_merging() -> None:
    """This holds on odd grids too: 10 × 20 tokens become 5 × 10 and 3 × 5, with steps of two and four patches."""
    trace = vs.capture(family("torchvision-swin").model(), pixels((20, 40)))
    statistics = vs.head_statistics(trace)
    for step in trace.blocks:
        dense = step.attention().double()
        grid = step.grid
        positions = torch.cartesian_prod(torch.arange(grid.height), torch.arange(grid.width)).double()
        distances = torch.cdist(positions, positions) * 2 ** (step.layer // 2)
        expected = ((dense * distances).sum(-1) / dense.sum(-1)).mean(-1).float()
        values = statistics.distance[:, step.layer]
        torch.testing.assert_close(values[:, : step.num_heads], expected, atol=1e-4, rtol=1e-4)
        assert values[:, step.num_heads :].isnan().all()


@pytest.mark.slow
@every_first
def test_half_precision_gives_similar_maps(swin: SwinFamily) -> None:
    model, images = swin.model(), pixels(SIZES["fitting"])
    full = vs.rollout(model, images), vs.window_cls(model, images).map(1)
    half = vs.load(model.module.to(torch.bfloat16))
    rolled, read = vs.rollout(half, images), vs.window_cls(half, images).map(1)
    torch.testing.assert_close(rolled.values, full[0].values, atol=0.3 / 256, rtol=0)
    torch.testing.assert_close(read.float(), full[1], atol=0.05, rtol=0)


def test_a_backbone_of_transformers_keeps_its_windows_on_a_small_grid() -> None:
    """It does not shrink them as the classifier does, so the shifts remain."""
    import transformers

    torch.manual_seed(0)
    config = transformers.SwinConfig(
        embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, image_size=16, patch_size=2
    )
    backbone = transformers.SwinBackbone(config).eval()
    trace = vs.capture(backbone, pixels((16, 16)))
    assert [is_shifted(step) for step in trace.blocks] == [False, True, False, True]
