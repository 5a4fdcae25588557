"""What people see of windows: a known pattern comes out where it is, and figures hold what they say."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vitscope as vs
from tests.cli.test_app import run
from tests.helpers.swin_families import MAXVIT, SIZES, SwinFamily, family, pixels
from vitscope.methods.window_attention import is_shifted, region_queries, window_regions
from vitscope.views import figure, windows

FIRST = [family("transformers-swin"), family("timm-swin"), family("torchvision-swin")]
every_first = pytest.mark.parametrize("swin", FIRST, ids=lambda swin: swin.name)


def disc(side: int = 16, patch: int = 2) -> tuple[Tensor, Tensor]:
    """An image of a bright disc off the middle, pixels ±1, and which patches are bright."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    bright = (rows - 6) ** 2 + (columns - 9) ** 2 <= 20
    values = (bright.float() * 2 - 1).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    return values.expand(1, 3, -1, -1), bright


@torch.no_grad()
def alike_attend_alike(model: vs.VisionModel) -> None:
    """The first block adds nothing; in the second a patch attends to patches of its own brightness, all the same."""
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


@every_first
def test_in_a_shifted_block_patches_see_their_like_in_their_own_window(swin: SwinFamily) -> None:
    model = swin.model()
    alike_attend_alike(model)
    image, bright = disc()
    trace = vs.capture(model, image)
    # Windows of 4 moved by 2, cut where they wrap around: rows 0-1, 2-5, …, 14-15.
    window = (torch.arange(16) + 2) // 4
    for row in range(16):
        for column in range(16):
            together = (window[:, None] == window[row]) & (window[None, :] == window[column])
            seen = together & (bright == bright[row, column])
            values = trace.map(1, "mean", (row, column))[0]
            torch.testing.assert_close(values, seen / seen.sum(), atol=1e-4, rtol=0)


@every_first
def test_one_query_in_each_window_fills_the_image(swin: SwinFamily) -> None:
    trace = vs.capture(swin.model(), pixels(SIZES["fitting"]))
    for layer, regions in ((0, 16), (1, 25), (2, 4), (3, 9), (4, 1)):
        result = vs.window_attention(trace, layer=layer, head=1)
        queries = result.provenance["queries"]
        assert len(queries) == regions
        expected = sum(trace.map(layer, 1, tuple(query)) for query in queries)
        torch.testing.assert_close(result.values, expected)
        torch.testing.assert_close(result.values.sum((1, 2)), torch.full((2,), float(regions)), atol=1e-3, rtol=0)


def test_regions_are_the_windows_cut_where_they_wrap() -> None:
    trace = vs.capture(family("timm-swin").model(), pixels(SIZES["fitting"]))
    for layer, moved in ((0, 0), (1, 2)):
        window = (np.arange(16) + moved) // 4
        expected = window[:, None] * 10 + window[None, :]
        regions = window_regions(trace.step(layer))
        pairs = set(zip(regions.ravel().tolist(), expected.ravel().tolist(), strict=True))
        assert len(pairs) == len(np.unique(regions)) == len(np.unique(expected))
        assert is_shifted(trace.step(layer)) == bool(moved)


@pytest.mark.parametrize(("place", "expected"), [((0.0, 0.0), (0, 0)), ((1.0, 1.0), (2, 3)), ((0.5, 0.5), (1, 1))])
def test_a_querys_place_is_counted_within_its_region(place: Any, expected: tuple[int, int]) -> None:
    assert region_queries(np.zeros((3, 4), dtype=int), place) == [expected]


def test_places_outside_a_window_are_refused() -> None:
    with pytest.raises(vs.CallError, match=r"place is 2\.0"):
        region_queries(np.zeros((3, 4), dtype=int), (2.0, 0.0))


@pytest.mark.parametrize("kind", ["padded", "odd"])
@every_first
def test_a_shifted_block_is_known_on_grids_that_need_padding(swin: SwinFamily, kind: str) -> None:
    trace = vs.capture(swin.model(SIZES[kind]), pixels(SIZES[kind]))
    assert [is_shifted(step) for step in trace.blocks[:4]] == [False, True, False, True]
    assert windows.shift_effect(trace, 0, (2, 2)).row_names == ["0", "1"]


def test_attention_spread_over_the_image_has_no_windows_to_show() -> None:
    trace = vs.capture(MAXVIT.model((64, 64)), pixels((64, 64)))
    spread = next(step for step in trace.blocks if ".attn_grid" in step.module)
    with pytest.raises(vs.CallError, match="spread over the image: name one as query"):
        vs.window_attention(trace, layer=spread.layer)
    panels = windows.query_heads(trace, spread.layer, (3, 1)).rows[0].panels
    np.testing.assert_array_equal(panels[1].values, trace.map(spread.layer, "mean", (3, 1))[0].numpy())
    assert figure.draw(windows.block_grid(trace, (0, 0)))


def test_a_plain_transformer_has_no_windows(folder) -> None:
    trace = vs.capture(vs.load(folder), torch.zeros(1, 3, 32, 32))
    with pytest.raises(vs.CallError, match="over all tokens at once"):
        vs.window_attention(trace)


@pytest.fixture(name="trace")
def trace_of_a_swin() -> vs.Trace:
    return vs.capture(family("torchvision-swin").model(), pixels(SIZES["fitting"], 1))


def test_the_windows_figure_has_the_mean_and_every_head(trace: vs.Trace) -> None:
    made = windows.window_heads(trace, 1)
    panels = [panel for row in made.rows for panel in row.panels]
    assert [panel.title for panel in panels[1:]] == ["mean of heads", "head 0", "head 1"]
    assert all(len(panel.marks) == panel.regions.max() + 1 == 25 for panel in panels)
    np.testing.assert_array_equal(panels[3].values, vs.window_attention(trace, layer=1, head=1).values[0])
    assert "stage 0, shifted, 16 × 16 patches" in made.title


def test_stages_are_counted_also_where_only_some_layers_were_kept() -> None:
    trace = vs.capture(family("torchvision-swin").model(), pixels(SIZES["fitting"], 1), layers=[2, -1])
    assert [[step.layer for step in stage] for stage in trace.stages] == [[], [2], [5]]
    assert "layer 2 (stage 1, 8 × 8 patches)" in windows.window_heads(trace, 2).title
    assert [len(row.panels) for row in windows.block_grid(trace).rows] == [1, 1]


@pytest.mark.parametrize("layer", [2, 3])
def test_the_shifted_partner_is_the_other_block_of_the_pair(trace: vs.Trace, layer: int) -> None:
    made = windows.shift_effect(trace, layer, (3, 4))
    assert made.row_names == ["2", "3"]
    np.testing.assert_array_equal(made.rows[1].panels[1].values, trace.map(3, "mean", (3, 4))[0])
    assert [row.panels[0].regions.max() + 1 for row in made.rows] == [4, 9]


def test_a_block_without_a_shifted_partner_is_refused(trace: vs.Trace) -> None:
    with pytest.raises(vs.CallError, match="layer 5 has no shifted partner"):
        windows.shift_effect(trace, 5, (0, 0))


def test_the_grid_of_blocks_has_a_row_a_stage(trace: vs.Trace) -> None:
    made = windows.block_grid(trace)
    assert [[panel.values.shape for panel in row.panels] for row in made.rows] == [[(n, n)] * 2 for n in (16, 8, 4)]
    assert [panel.title for panel in made.rows[0].panels] == ["layer 0", "layer 1, shifted"]


def test_stages_are_the_rollouts_at_their_ends(trace: vs.Trace) -> None:
    results = vs.rollout_evolution(trace)
    panels = windows.stage_evolution(trace, results).rows[0].panels
    assert [panel.title for panel in panels] == ["photo", "after stage 0", "after stage 1", "after stage 2"]
    for panel, end in zip(panels[1:], (1, 3, 5), strict=True):
        np.testing.assert_array_equal(panel.values, results[end].values[0])


def test_the_cls_figure_sets_it_beside_mean_attention_and_rollout() -> None:
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


def test_outlines_lie_on_the_windows_borders() -> None:
    """Four windows on a photo of 40 × 20 pixels: red on their borders and around the mark, and nowhere else."""
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
    (entry,) = json.loads(out)
    with Image.open(entry["figure"]) as image:
        assert image.width > 900


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["attention", "--shifted"], "--shifted compares one query in two layers"),
        (["attention", "--layer", "7", "--query", "0,0", "--shifted"], "layer 7 has no shifted partner"),
        (["attention", "--query", "16,0"], "lies outside the grid of 16 rows"),
        (["attention", "--window-cls", "--query", "1,1"], "leave out --query"),
        (["attention", "--window-cls", "--shifted", "--layer", "0", "--query", "1,1"], "pass one of them"),
        (["rollout", "--stages", "--evolution"], "pass one of them"),
        (["rollout", "--target", "kat"], "target 'kat' is no label of this model: did you mean cat"),
        (["attention", "--model", "vit-nano", "--window-cls"], "no windows that a CLS token can be put into"),
    ],
    ids=str,
)
def test_mistakes_get_one_line(tmp_path, chelsea, capsys, monkeypatch, arguments: list[str], line: str) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.fromarray(chelsea).save("cat.png")
    model = [] if "--model" in arguments else ["--model", "swin-nano"]
    code, _, err = run(capsys, monkeypatch, arguments[0], "cat.png", *model, *arguments[1:])
    assert code == 2
    assert line in err
    assert err.count("\n") == 1


def test_the_json_of_a_layer_is_what_its_figure_shows(tmp_path, chelsea, capsys, monkeypatch) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.fromarray(chelsea).save("cat.png")
    _, out, _ = run(capsys, monkeypatch, "attention", "cat.png", "--model", "swin-nano", "--layer", "3", "--json")
    values = json.loads(out)[0]["values_mean_of_heads"]["3"]
    expected = vs.window_attention(vs.load("swin-nano"), chelsea, layer=3).values[0]
    np.testing.assert_allclose(values, expected, atol=1e-6)


def test_distances_are_in_finest_patches_after_merging() -> None:
    """On odd grids too: 10 × 20 tokens become 5 × 10 and 3 × 5, a step of which is two and four patches."""
    trace = vs.capture(family("torchvision-swin").model(), pixels((20, 40)))
    statistics = vs.head_statistics(trace)
    for step in trace.blocks:
        dense = step.attention().double()
        grid = step.grid
        places = torch.cartesian_prod(torch.arange(grid.height), torch.arange(grid.width)).double()
        far = torch.cdist(places, places) * 2 ** (step.layer // 2)
        expected = ((dense * far).sum(-1) / dense.sum(-1)).mean(-1).float()
        got = statistics.distance[:, step.layer]
        torch.testing.assert_close(got[:, : step.num_heads], expected, atol=1e-4, rtol=1e-4)
        assert got[:, step.num_heads :].isnan().all()


@every_first
def test_half_precision_gives_nearly_the_same_maps(swin: SwinFamily) -> None:
    model, images = swin.model(), pixels(SIZES["fitting"])
    full = vs.rollout(model, images), vs.window_cls(model, images).map(1)
    half = vs.load(model.module.to(torch.bfloat16))
    rolled, read = vs.rollout(half, images), vs.window_cls(half, images).map(1)
    torch.testing.assert_close(rolled.values, full[0].values, atol=0.3 / 256, rtol=0)
    torch.testing.assert_close(read.float(), full[1], atol=0.05, rtol=0)


def test_a_backbone_of_transformers_keeps_its_windows_on_a_small_grid() -> None:
    """It does not shrink them as the classifier does: shifts stay, as its own padding and rolling show."""
    import transformers

    torch.manual_seed(0)
    config = transformers.SwinConfig(
        embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, image_size=16, patch_size=2
    )
    backbone = transformers.SwinBackbone(config).eval()
    trace = vs.capture(backbone, pixels((16, 16)))
    assert [is_shifted(step) for step in trace.blocks] == [False, True, False, True]
