"""Laws of geometry, searched for counterexamples: windows, merging, crops, discarding and masks at any size."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from vitscope.attention.windows import PADDING, Windows, merge_groups, merged_grid, window_of_token
from vitscope.grid import Grid
from vitscope.images.preprocessing import Preprocessing
from vitscope.methods.rollout import discard_smallest
from vitscope.perturb.masks import KernelSampler, PairedSampler, UniformSampler

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

search = hypothesis.settings(deadline=None, derandomize=True, max_examples=80, database=None)
sides = st.integers(1, 15)
windows = st.integers(1, 6)


@pytest.mark.slow
@search
@hypothesis.given(sides, sides, windows, windows, st.data(), st.booleans())
def test_slots_are_the_library_operations_on_token_numbers(
    height: int, width: int, down: int, across: int, data: st.DataObject, roll_first: bool
) -> None:
    """Pad, roll and cut an image of token numbers with plain numpy, in the order of each library."""
    shift = data.draw(st.integers(0, down - 1)), data.draw(st.integers(0, across - 1))
    slots = Windows((down, across), shift, roll_first).slots(Grid(height, width)).numpy()

    tokens = np.arange(height * width).reshape(height, width)
    missing = (0, math.ceil(height / down) * down - height), (0, math.ceil(width / across) * across - width)

    def roll(array: np.ndarray) -> np.ndarray:
        return np.roll(array, (-shift[0], -shift[1]), (0, 1))

    def pad(array: np.ndarray) -> np.ndarray:
        return np.pad(array, missing, constant_values=PADDING)

    canvas = pad(roll(tokens)) if roll_first else roll(pad(tokens))
    expected = [
        canvas[top : top + down, left : left + across].ravel()
        for top in range(0, canvas.shape[0], down)
        for left in range(0, canvas.shape[1], across)
    ]
    assert np.array_equal(slots, np.stack(expected))


@search
@hypothesis.given(sides, sides, windows, windows, st.data(), st.booleans(), st.booleans())
def test_every_token_has_exactly_one_slot(
    height: int, width: int, down: int, across: int, data: st.DataObject, roll_first: bool, dilated: bool
) -> None:
    shift = data.draw(st.integers(0, down - 1)), data.draw(st.integers(0, across - 1))
    grid = Grid(height, width)
    slots = Windows((down, across), shift, roll_first, dilated).slots(grid)
    assert sorted(slots[slots != PADDING].tolist()) == list(range(grid.num_patches))
    owners = window_of_token(slots, grid.num_patches)
    assert all(token in slots[owner] for token, owner in enumerate(owners.tolist()))


@search
@hypothesis.given(sides, sides)
def test_merging_takes_every_token_once(height: int, width: int) -> None:
    grid = Grid(height, width)
    groups, merged = merge_groups(grid), merged_grid(grid)
    assert groups.shape == (merged.num_patches, 4)
    assert sorted(groups[groups != PADDING].tolist()) == list(range(grid.num_patches))
    for number, group in enumerate(groups.tolist()):
        row, column = divmod(number, merged.width)
        rows = {(token // width) // 2 for token in group if token != PADDING}
        columns = {(token % width) // 2 for token in group if token != PADDING}
        assert (rows, columns) == ({row}, {column})


@search
@hypothesis.given(
    st.integers(8, 90),
    st.integers(8, 90),
    st.integers(4, 40),
    st.integers(4, 40),
    st.sampled_from(["squash", "crop"]),
    st.floats(0.6, 1.0),
)
def test_the_box_is_the_part_of_the_photo_that_the_model_sees(
    photo_width: int, photo_height: int, height: int, width: int, fit: str, crop_ratio: float
) -> None:
    """A photo whose red channel grows to the right and green downwards: the input's corners name their pixels."""
    columns = np.linspace(0, 255, photo_width)[None, :].repeat(photo_height, 0)
    rows = np.linspace(0, 255, photo_height)[:, None].repeat(photo_width, 1)
    photo = Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))
    resize_to = (round(height / crop_ratio), round(width / crop_ratio)) if fit == "crop" else None
    preprocessing = Preprocessing((height, width), fit=fit, resize_to=resize_to)
    pixels, view = preprocessing(photo)
    assert tuple(pixels.shape) == (3, height, width)
    left, top, right, bottom = view.box
    if fit == "squash":
        assert view.box == pytest.approx((0, 0, photo_width, photo_height))
    # One pixel of the input covers this many of the photo.
    step = ((right - left) / width, (bottom - top) / height)
    colours = (pixels * 0.5 + 0.5) * 255
    for axis, (values, extent, start, stride) in enumerate(
        ((colours[0].mean(0), photo_width, left, step[0]), (colours[1].mean(1), photo_height, top, step[1]))
    ):
        centre = len(values) // 2
        position = start + (centre + 0.5) * stride - 0.5
        expected = 255 * min(max(position, 0), extent - 1) / max(extent - 1, 1)
        # Bilinear resampling and rounding to bytes move a ramp by less than two pixels of the coarser side.
        tolerance = 2 * 255 * max(stride, 1) / max(extent - 1, 1) + 2
        assert abs(float(values[centre]) - expected) <= tolerance, axis


@search
@hypothesis.given(st.integers(1, 3), st.integers(1, 12), st.floats(0, 1), st.integers(0, 3), st.integers(0, 2**16))
def test_discarding_zeroes_the_smallest_entries_and_no_more(
    images: int, tokens: int, ratio: float, levels: int, seed: int
) -> None:
    """Ties included: with few levels most entries are equal."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    fused = torch.rand(images, 1, tokens, tokens, generator=generator, device="cpu") + 0.01
    if levels:
        fused = (fused * levels).ceil() / levels
    kept = discard_smallest(fused, ratio)
    for before, after in zip(fused.flatten(1), kept.flatten(1), strict=True):
        zeros = after == 0
        assert int(zeros.sum()) == math.floor(ratio * before.numel())
        assert torch.equal(after[~zeros], before[~zeros])
        if zeros.any() and not zeros.all():
            assert before[zeros].max() <= before[~zeros].min()


@search
@hypothesis.given(
    st.sampled_from(["uniform", "paired", "kernel"]),
    st.integers(1, 12),
    st.integers(0, 2**16),
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
)
def test_masks_drawn_in_portions_begin_with_the_whole_image(
    name: str, segments: int, seed: int, portions: list[int]
) -> None:
    samplers = {
        "uniform": lambda: UniformSampler(segments, seed),
        "paired": lambda: PairedSampler(segments, seed),
        "kernel": lambda: KernelSampler(segments, seed, lambda counts: np.exp(-counts.astype(float))),
    }
    sampler, again = samplers[name](), samplers[name]()
    rows = np.concatenate([sampler.draw(count) for count in portions])
    assert rows.shape == (sum(portions), segments)
    assert rows[0].all()
    assert np.array_equal(rows, np.concatenate([again.draw(count) for count in portions]))
    if name != "kernel":  # independent of how the rows are divided
        assert np.array_equal(rows, samplers[name]().draw(sum(portions)))
    if name == "paired":
        pairs = rows[1 : 1 + (len(rows) - 1) // 2 * 2]
        assert (pairs[::2] ^ pairs[1::2]).all()
