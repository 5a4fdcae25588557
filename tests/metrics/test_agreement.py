"""Agreement of attributions: Spearman's rank correlation, the overlap of top regions, and refusals."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitscope as vs
from tests.helpers.tiny import tiny_vit


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def attribution(values: np.ndarray, photo: Image.Image, method: str = "method", model: str = "model") -> vs.Attribution:
    height, width = values.shape
    box = (0.0, 0.0, float(photo.width), float(photo.height))
    tensor = torch.from_numpy(values.astype(np.float32))[None]
    provenance = {"method": method, "model": model}
    return vs.Attribution(tensor, vs.Grid(height, width), [vs.InputImage(photo, box)], provenance)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(noise(24, 36))


def maps(count: int, size: tuple[int, int] = (24, 36)) -> list[np.ndarray]:
    random = np.random.default_rng(2)
    return [random.integers(0, 40, size).astype(float) for _ in range(count)]


def test_agreement_is_spearmans_correlation_and_the_overlap_of_the_top_regions(photo: Image.Image) -> None:
    from scipy.stats import spearmanr

    arrays = maps(3)
    result = vs.agreement([attribution(values, photo) for values in arrays], top=0.3)
    for i, first in enumerate(arrays):
        for j, second in enumerate(arrays):
            expected = spearmanr(first.ravel(), second.ravel()).statistic
            assert result.rank_correlation[i, j] == pytest.approx(expected, abs=1e-12)
            levels = [np.unique(values)[::-1] for values in (first, second)]
            regions = []
            for values, thresholds in zip((first, second), levels, strict=True):
                shares = [(values >= threshold).mean() for threshold in thresholds]
                regions.append(values >= thresholds[int(np.argmin(np.abs(np.array(shares) - 0.3)))])
            union = (regions[0] | regions[1]).sum()
            assert result.overlap[i, j] == pytest.approx((regions[0] & regions[1]).sum() / union)
    assert result.top == 0.3


def test_a_map_agrees_with_itself_and_not_with_its_opposite(photo: Image.Image) -> None:
    (array,) = maps(1)
    result = vs.agreement([attribution(values, photo) for values in (array, array, -array, array**3)])
    assert result.rank_correlation == pytest.approx(
        np.array([[1, 1, -1, 1], [1, 1, -1, 1], [-1, -1, 1, -1], [1, 1, -1, 1]])
    )
    assert result.overlap[0, [1, 3]] == pytest.approx([1, 1])
    assert result.overlap[0, 2] == 0
    assert np.array_equal(result.overlap, result.overlap.T)


def test_independent_maps_overlap_by_chance(photo: Image.Image) -> None:
    random = np.random.default_rng(0)
    for top in (0.1, 0.2, 0.5):
        result = vs.agreement([attribution(random.random((24, 36)), photo) for _ in range(30)], top=top)
        pairs = ~np.eye(30, dtype=bool)
        assert result.overlap[pairs].mean() == pytest.approx(result.chance[pairs].mean(), abs=0.01)
        assert abs(result.rank_correlation[pairs].mean()) < 0.02
        np.testing.assert_allclose(result.chance, top / (2 - top), atol=0.005)


def test_chance_depends_on_the_actual_size_of_the_regions(photo: Image.Image) -> None:
    """Two halves are regions of one half, whatever ``top`` is."""
    left, upper = np.zeros((24, 36)), np.zeros((24, 36))
    left[:, :18], upper[:12] = 1, 1
    result = vs.agreement([attribution(left, photo), attribution(upper, photo)], top=0.4)
    assert result.overlap[0, 1] == pytest.approx(1 / 3)
    assert result.chance[0, 1] == pytest.approx(1 / 3)


def test_a_constant_map_has_no_rank_correlation(photo: Image.Image) -> None:
    result = vs.agreement([attribution(np.ones((24, 36)), photo), attribution(maps(1)[0], photo)])
    assert np.isnan(result.rank_correlation[0, 1])
    saved = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert saved["rank_correlation"][0][1] is None
    assert saved["overlap"] == result.overlap.tolist()
    assert (saved["top"], saved["chance"]) == (0.2, result.chance.tolist())


def test_grids_of_any_kind_are_compared_on_the_photo(photo: Image.Image) -> None:
    coarse = np.arange(6.0).reshape(2, 3)
    fine = coarse.repeat(12, 0).repeat(12, 1)
    result = vs.agreement([attribution(coarse, photo), attribution(fine, photo)])
    assert result.rank_correlation[0, 1] > 0.9


def test_only_pixels_that_all_maps_cover_are_compared(photo: Image.Image) -> None:
    values = maps(1)[0]
    left = vs.Attribution(
        torch.from_numpy(values[:, :18].astype(np.float32))[None],
        vs.Grid(24, 18),
        [vs.InputImage(photo, (0.0, 0.0, 18.0, 24.0))],
    )
    spoilt = values.copy()
    spoilt[:, 18:] = 0
    result = vs.agreement([left, attribution(values, photo), attribution(spoilt, photo)])
    assert result.rank_correlation[1, 2] == pytest.approx(1)


def test_names_are_the_models_or_the_methods_whichever_differ(photo: Image.Image) -> None:
    (values,) = maps(1)

    def names(*pairs: tuple[str, str]) -> list[str]:
        return list(vs.agreement([attribution(values, photo, method, model) for method, model in pairs]).names)

    assert names(("lime", "a"), ("rise", "a")) == ["lime", "rise"]
    assert names(("lime", "a"), ("lime", "b")) == ["a", "b"]
    assert names(("lime", "a"), ("rise", "b")) == ["a, lime", "b, rise"]
    named = vs.agreement([attribution(values, photo)] * 2, names=["first", "second"])
    assert named.names == ["first", "second"]
    assert named.as_json()["names"] == ["first", "second"]


def test_methods_of_one_image_can_be_compared() -> None:
    model, image = vs.load(tiny_vit()), noise(30, 40)
    results = [
        vs.lime(model, image, target=0, num_samples=40, segments="patches"),
        vs.occlusion(model, image, target=0),
        vs.rise(model, image, target=0, num_samples=20),
        vs.rollout(model, image),
    ]
    result = vs.agreement(results)
    assert list(result.names) == ["lime", "occlusion", "rise", "rollout"]
    assert np.diag(result.rank_correlation) == pytest.approx(np.ones(4))
    assert bool((np.abs(result.rank_correlation) <= 1 + 1e-12).all())


def test_loaded_results_agree_as_they_did_with_their_photo(photo: Image.Image, tmp_path: Any) -> None:
    arrays = [*maps(2), maps(1, (4, 6))[0]]
    results = [attribution(values, photo) for values in arrays]
    loaded = [vs.Attribution.load(r.save(tmp_path / f"{i}.safetensors")) for i, r in enumerate(results)]
    expected = vs.agreement(results)
    for mixed in (loaded, [results[0], *loaded[1:]], [result.with_photos(photo) for result in loaded]):
        assert np.array_equal(vs.agreement(mixed).rank_correlation, expected.rank_correlation)


def test_incomparable_results_are_refused_in_one_line(photo: Image.Image, tmp_path: Any) -> None:
    result = attribution(maps(1)[0], photo)
    different = attribution(maps(1)[0], Image.fromarray(noise(24, 36, seed=8)))
    loaded = vs.Attribution.load(result.save(tmp_path / "map.safetensors"))
    unknown = vs.Attribution(result.values, result.grid)
    batch = vs.Attribution(result.values.repeat(2, 1, 1), result.grid, [*result.images] * 2)
    left = vs.Attribution(result.values, result.grid, [vs.InputImage(photo, (0.0, 0.0, 10.0, 24.0))])
    right = vs.Attribution(result.values, result.grid, [vs.InputImage(photo, (20.0, 0.0, 36.0, 24.0))])
    wrong: list[tuple[list[vs.Attribution], dict[str, Any], str]] = [
        ([result], {}, "two or more results, got 1"),
        ([], {}, "two or more results, got 0"),
        ([result, different], {}, "results of the same photo"),
        ([result, unknown], {}, "a result does not describe: explain the image again"),
        ([different, loaded], {}, "results of the same photo"),
        ([result, batch], {}, "results of one image each"),
        ([left, right], {}, "no common part"),
        ([result, result], {"top": 0.0}, "top is 0.0"),
        ([result, result], {"top": 1.5}, "top is 1.5"),
        ([result, result], {"names": ["a"]}, "1 names for 2 results"),
    ]
    for results, options, message in wrong:
        with pytest.raises(vs.CallError, match=message) as caught:
            vs.agreement(results, **options)
        assert "\n" not in str(caught.value)
