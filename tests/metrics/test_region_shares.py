"""Region shares: equal to a slow raster, the laws of shares, random maps, means over photos, and refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitscope as vs
from tests.reference import region_shares as slow
from vitscope.metrics.region_shares import RegionShares

SIZE = (18, 24)  # height and width of the photos
Box = tuple[float, float, float, float]
SEEN: dict[str, Box] = {
    "whole": (0, 0, 24, 18),
    "crop": (3, 0, 21, 18),
    "inside pixels": (2.5, 1.25, 22.5, 16.25),
    "padded": (-4, -2, 26, 20),
}


def attribution(values: Any, *, box: Box = SEEN["whole"], signed: bool = False, **fields: Any) -> vs.Attribution:
    """Return the result of photos of 18×24 pixels; values are (batch, height, width) or (height, width)."""
    array = np.asarray(values, dtype=np.float32)
    tensor = torch.from_numpy(array if array.ndim == 3 else array[None])
    left, top, right, bottom = map(float, box)
    images = [
        vs.InputImage(Image.new("RGB", SIZE[::-1], (index, 0, 0)), (left, top, right, bottom), f"photo {index}")
        for index in range(len(tensor))
    ]
    return vs.Attribution(tensor, vs.Grid(*tensor.shape[1:]), images, signed=signed, **fields)


def noise(*shape: int, seed: int = 0, signed: bool = False) -> np.ndarray:
    values = np.random.default_rng(seed).gamma(1.0, size=shape)
    return values - 1.0 if signed else values


def blob(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random(SIZE) > 0.6


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("seen", SEEN)
def test_shares_equal_those_of_a_fine_raster(seen: str, signed: bool) -> None:
    values, mask, box = noise(3, 6, signed=signed), blob(), SEEN[seen]
    result = vs.region_shares(attribution(values, box=box, signed=signed), {"blob": mask}, draws=1)
    raster = slow.points(values, box, SIZE)
    assert result.parts == (("supports", "opposes") if signed else ("all",))
    for part, sign in enumerate((1, -1) if signed else (0,)):
        share, area = slow.share_and_area(raster, mask, sign)
        assert result.share[0, part, 0] == pytest.approx(share, abs=1e-6)
        assert result.area[0, 0] == pytest.approx(area, abs=1e-9)
        assert result.ratio[0, part, 0] == pytest.approx(share / area, abs=1e-5)


def test_dropped_patches_belong_to_neither_share_nor_area() -> None:
    values, mask = noise(3, 6), blob()
    dropped = noise(3, 6, seed=5) > 1.0
    values[dropped] = 0.0
    result = attribution(values, dropped=torch.from_numpy(dropped)[None])
    measured = vs.region_shares(result, {"blob": mask}, draws=1)
    share, area = slow.share_and_area(slow.points(values, SEEN["whole"], SIZE, dropped), mask)
    assert (measured.share[0, 0, 0], measured.area[0, 0]) == pytest.approx((share, area), abs=1e-6)


@pytest.mark.slow
def test_random_maps_are_shifted_and_mirrored() -> None:
    """The random maps are all shifts of all mirror images, and each equally often."""
    values, mask, box = noise(3, 4), blob(), SEEN["padded"]
    result = vs.region_shares(attribution(values, box=box), {"blob": mask}, draws=4000)
    expected = [
        slow.share_and_area(slow.points(slow.random_map(values, *choice), box, SIZE), mask)[0]
        for choice in np.ndindex(2, 2, 3, 4)
    ]
    random = result.random[0, 0, 0]
    distances = np.abs(random[:, None] - np.array(expected))
    assert distances.min(1).max() < 1e-6
    assert len({round(share, 6) for share in expected}) == 48
    for share in expected:
        frequency = (np.abs(np.array(expected) - share) < 1e-6).mean()
        assert (np.abs(random - share) < 1e-6).mean() == pytest.approx(frequency, abs=0.02)


def test_a_uniform_map_has_the_ratio_1_everywhere() -> None:
    for box in SEEN.values():
        result = vs.region_shares(attribution(np.ones((4, 6)), box=box), {"blob": blob(), "edge": "border"}, draws=20)
        np.testing.assert_allclose(result.ratio, 1.0, atol=1e-6)
        np.testing.assert_allclose(result.random[0, 0] / result.area[0][:, None], 1.0, atol=1e-6)
        assert [row.p_value for row in result.rows()] == [1.0, 1.0]


def test_random_maps_have_the_ratio_1_on_average() -> None:
    result = vs.region_shares(attribution(noise(6, 8)), {"blob": blob(), "box": (2, 3, 9, 4)}, draws=4000)
    np.testing.assert_allclose(result.random[0, 0].mean(1) / result.area[0], 1.0, atol=0.02)


def test_a_map_inside_the_region_has_the_share_1_and_outside_0() -> None:
    values = np.zeros((3, 4))
    values[1, 2] = 7.0
    patch, rest = (12, 6, 6, 6), np.ones(SIZE, dtype=bool)
    rest[6:12, 12:18] = False
    result = vs.region_shares(attribution(values), {"patch": patch, "rest": rest})
    assert result.share[0, 0].tolist() == pytest.approx([1.0, 0.0])
    assert result.area[0].tolist() == pytest.approx([1 / 12, 11 / 12])
    inside, outside = result.rows()
    assert (inside.ratio, outside.ratio) == pytest.approx((12.0, 0.0))
    assert inside.p_value == pytest.approx(2 / 12, abs=0.05)  # a twelfth of all shifts is as extreme, on one side


@pytest.mark.parametrize("signed", [False, True])
def test_the_shares_of_a_partition_sum_to_1(signed: bool) -> None:
    labels = np.random.default_rng(4).integers(0, 3, SIZE)
    for box in SEEN.values():
        result = attribution(noise(4, 7, signed=signed), box=box, signed=signed)
        shares = vs.region_shares(result, {str(label): labels == label for label in range(3)}, draws=30)
        np.testing.assert_allclose(shares.share.sum(-1), 1.0)
        np.testing.assert_allclose(shares.area.sum(-1), 1.0)
        np.testing.assert_allclose(shares.random.sum(2), 1.0)


def test_shares_do_not_depend_on_the_scale_of_the_map() -> None:
    values = noise(4, 6, signed=True)
    small, large = (vs.region_shares(attribution(c * values, signed=True), "border") for c in (1e-6, 1e4))
    np.testing.assert_allclose(small.share, large.share, rtol=1e-5)
    np.testing.assert_allclose(small.random, large.random, atol=1e-6)


def test_the_signs_of_a_map_exchange_its_parts() -> None:
    values = noise(4, 6, signed=True)
    positive, negative = (vs.region_shares(attribution(c * values, signed=True), {"b": blob()}) for c in (1, -1))
    np.testing.assert_array_equal(positive.share, negative.share[:, ::-1])


def test_a_part_that_a_map_lacks_has_no_share() -> None:
    result = vs.region_shares(attribution(noise(4, 6), signed=True), "border", draws=10)
    supports, opposes = result.rows()
    assert (supports.photos, opposes.photos) == (1, 0)
    assert np.isnan([opposes.share, opposes.ratio, opposes.p_value]).all()
    entry = json.loads(json.dumps(result.as_json(), allow_nan=False))["photos"][1]
    assert (entry["share"], entry["random_interval"]) == (None, [None, None])


def test_a_region_that_the_model_does_not_see_has_no_share() -> None:
    result = attribution(noise(2, 2), box=(6, 0, 24, 18))
    shares = vs.region_shares(result, {"left": (0, 0, 5, 18), "right": (10, 0, 14, 18)}, draws=10)
    assert np.isnan(shares.share[0, 0, 0])
    assert shares.area[0].tolist() == pytest.approx([0.0, 14 / 18])
    assert [row.photos for row in shares.rows()] == [0, 1]


def test_the_border_is_the_outer_tenth_of_the_photo() -> None:
    expected = np.ones(SIZE, dtype=bool)
    expected[2:16, 2:22] = False  # a tenth of 18 and of 24 pixels, rounded
    border, mask = vs.region_shares(attribution(noise(9, 12)), {"border": "border", "mask": expected}, draws=5).rows()
    assert (border.share, border.area) == (mask.share, mask.area) == (pytest.approx(border.share), 1 - 14 * 20 / 432)


def test_regions_are_accepted_in_every_form(tmp_path: Path) -> None:
    mask = np.zeros(SIZE, dtype=bool)
    mask[4:12, 6:18] = True
    Image.fromarray(mask).save(tmp_path / "mask.png")
    corners = [(6, 4), (18, 4), (18, 12), (6, 12)]
    regions = {
        "box": (6, 4, 12, 8), "list": [6, 4, 12, 8], "mask": mask, "file": tmp_path / "mask.png", "corners": corners,
        "object": vs.object_mask(Image.new("RGB", SIZE[::-1]), box=(6, 4, 12, 8)), "each": [(6, 4, 12, 8)],
    }  # fmt: skip
    shares = vs.region_shares(attribution(noise(9, 12)), regions, draws=3)
    assert shares.regions == list(regions)
    np.testing.assert_allclose(shares.share, shares.share[0, 0, 0])
    single = vs.region_shares(attribution(noise(9, 12)), regions["object"], draws=3)
    assert (single.regions, single.share[0, 0, 0]) == (["object"], shares.share[0, 0, 0])
    pair = vs.region_shares(attribution(noise(9, 12)), [regions["object"], "border"], draws=3)
    assert pair.regions == ["object", "border"]


def test_each_photo_has_its_own_region_or_none() -> None:
    values, masks = noise(3, 4, 6), [blob(1), None, blob(2)]
    batch = vs.region_shares(attribution(values), {"blob": masks, "edge": "border"}, draws=10)
    for index in (0, 2):
        single = vs.region_shares(attribution(values[index]), {"blob": masks[index]}, draws=10)
        assert batch.share[index, 0, 0] == single.share[0, 0, 0]
    assert np.isnan(batch.share[1, 0, 0])
    blobs, edges = batch.means()
    assert (blobs.photos, edges.photos) == (2, 3)
    assert blobs.share == pytest.approx(np.nanmean(batch.share[:, 0, 0]))
    empty = vs.region_shares(attribution(values[0]), {"blob": np.zeros(SIZE, dtype=bool)}, draws=10)
    assert np.isnan(empty.share).all()


def test_weights_of_segments_count_once_whatever_their_size(chelsea: np.ndarray) -> None:
    labels = np.zeros(chelsea.shape[:2], dtype=int)
    labels[:, 40:], labels[:100, 300:], labels[150:, :200] = 1, 2, 3
    result = vs.lime(vs.load("vit-nano"), chelsea, segments=labels, num_samples=60)
    shares = vs.region_shares(result, {str(label): labels == label for label in range(4)}, draws=5)
    for part, sign in enumerate((1, -1)):
        weights = (sign * result.weights.numpy()).clip(0)
        assert (weights > 0).any()
        np.testing.assert_allclose(shares.share[0, part], weights / weights.sum(), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rollout", "libra", "occlusion", "lime", "rise", "grad_cam"])
def test_every_kind_of_map_is_measured(name: str, chelsea: np.ndarray) -> None:
    options: dict[str, Any] = {"lime": {"num_samples": 80, "segments": "patches"}, "rise": {"num_samples": 40}}.get(
        name, {}
    )
    result = getattr(vs, name)(vs.load("swin-nano"), chelsea, target="cat", **options)
    top, bottom = (0, 0, 451, 150), (0, 150, 451, 150)
    shares = vs.region_shares(result, {"top": top, "bottom": bottom}, draws=10)
    np.testing.assert_allclose(shares.share.sum(-1), 1.0, atol=1e-9)
    assert np.isfinite(shares.random).all()


def test_the_seed_determines_the_random_maps() -> None:
    result = attribution(noise(6, 8))
    first, again, reseeded = (vs.region_shares(result, "border", draws=50, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.random, again.random)
    assert first.rows() == again.rows()
    assert (first.random != reseeded.random).any()
    assert first.share == reseeded.share


def many(count: int, strength: float = 0.0) -> RegionShares:
    """Return the shares of the left half, for noise that is stronger there."""
    values = noise(count, 6, 8, seed=7)
    values[:, :, :4] += strength
    return vs.region_shares(attribution(values), {"left": (0, 0, 12, 18)}, draws=500)


def test_means_are_means_with_bootstrap_intervals() -> None:
    shares = many(40, 0.3)
    (mean,) = shares.means()
    assert (mean.name, mean.photos) == ("all photos", 40)
    assert mean.share == pytest.approx(shares.share.mean())
    assert mean.ratio == pytest.approx(shares.share.mean() / shares.area.mean())
    error = 1.96 * shares.share.std(ddof=1) / 40**0.5
    assert mean.share_interval == pytest.approx((mean.share - error, mean.share + error), abs=0.2 * error)
    assert mean.ratio_interval == pytest.approx((2 * (mean.share - error), 2 * (mean.share + error)), abs=0.4 * error)
    assert all(row.share_interval is None for row in shares.rows())


def test_random_maps_of_many_photos_vary_less_also_if_they_were_measured_apart() -> None:
    """Photos that are measured apart have the same random numbers, so their draws have to be shuffled."""
    values = noise(1, 6, 8, seed=7).repeat(25, 0)
    region = {"corner": (0, 0, 9, 9)}
    batch = vs.region_shares(attribution(values), region, draws=500)
    joined = RegionShares.join([vs.region_shares(single, region, draws=500) for single in attribution(values)])
    assert (joined.random[0] == joined.random[1]).all()
    width = 2 * 1.96 * float((joined.random[0] / joined.area[0]).std())
    for shares in (batch, joined):
        low, high = shares.means()[0].random_interval
        assert high - low == pytest.approx(width / 5, rel=0.15)


def test_the_p_value_separates_chance_from_a_preference() -> None:
    region = {"corner": (0, 0, 9, 9)}
    rows = [vs.region_shares(attribution(noise(6, 8, seed=seed)), region).rows()[0] for seed in range(200)]
    assert np.mean([row.p_value <= 0.1 for row in rows]) == pytest.approx(0.1, abs=0.05)
    assert many(40).means()[0].p_value > 0.02
    assert many(40, 0.5).means()[0].p_value == pytest.approx(2 / 501)


def test_groups_are_means_of_their_own() -> None:
    shares = many(6)
    groups = ["cat", "dog", "cat", "cat", "bird", "dog"]
    means = shares.means(groups)
    assert [(row.name, row.photos) for row in means] == [("cat", 3), ("dog", 2), ("bird", 1)]
    assert means[0].share == pytest.approx(shares.share[[0, 2, 3]].mean())
    assert means[2].share_interval is None
    assert set(shares.as_json()) == {"photos", "means"}
    with pytest.raises(vs.CallError, match=r"^2 groups for 6 photos: pass one group for each photo$"):
        shares.means(["cat", "dog"])


def test_reprs_and_join() -> None:
    shares = many(2)
    assert repr(shares).startswith("<RegionShares: 2 photos, left ")
    assert repr(shares.rows()[0]).startswith("<RegionShare of left: ")
    again = RegionShares.join([many(2), many(2)])
    assert (len(again.photos), again.share.shape, again.area.shape) == (4, (4, 1, 1), (4, 1))
    with pytest.raises(vs.CallError, match=r"^join takes a list of at least one RegionShares$"):
        RegionShares.join([])
    with pytest.raises(vs.CallError, match=r"^cannot combine shares of other regions"):
        RegionShares.join([shares, vs.region_shares(attribution(noise(2, 2)), "border", draws=500)])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ({}, "no region was passed: pass a mapping"),
        (None, "regions is None: pass a mapping from names to boxes"),
        ((1, 2, 3, 4), r"regions is \(1, 2, 3, 4\): pass a mapping"),
        ({"a": None}, "the region a is None: pass a box"),
        ({"a": (0, 0, 30, 5)}, "the box of a is 0,0,30,5 .* reaches outside the image of 24×18 pixels"),
        ({"a": np.ones((3, 3), dtype=bool)}, r"the mask of a is 3×3 \(height×width\), the image is 18×24"),
        ({"a": [blob(), blob()]}, "2 regions a for 1 photos: pass one for each photo, or one for all"),
        ({"a": 5}, "the outline of a is not a polygon"),
        ({"a": "missing.png"}, "missing.png does not exist"),
    ],
    ids=str,
)
def test_regions_that_do_not_fit_are_refused(regions: Any, message: str) -> None:
    with pytest.raises(vs.VitscopeError, match=f"^{message}"):
        vs.region_shares(attribution(noise(2, 2)), regions)


@pytest.mark.usefixtures("unchecked")
def test_results_and_options_that_cannot_be_measured_are_refused() -> None:
    with pytest.raises(vs.CallError, match=r"^result is 5: an attribution is expected"):
        vs.region_shares(5, "border")  # type: ignore[arg-type]
    with pytest.raises(vs.CallError, match="holds no photos: attach them with"):
        vs.region_shares(vs.Attribution(torch.ones(1, 2, 2), vs.Grid(2, 2)), "border")
    with pytest.raises(vs.CallError, match=r"^the map has negative values, but it is not signed"):
        vs.region_shares(attribution(noise(2, 2) - 5), "border")
    for option in ("draws", "seed"):
        with pytest.raises(vs.CallError, match=f"{option} is -1"):
            vs.region_shares(attribution(noise(2, 2)), "border", **{option: -1})
