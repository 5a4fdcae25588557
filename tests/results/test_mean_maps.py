"""Mean maps: every photo counts equally, what the model sees is aligned, and coarser grids keep their sums."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitscope as vs
from vitscope.results.mean_maps import MAX_CELLS, MAX_PIXELS, reduced

Box = tuple[float, float, float, float]


def attribution(values: Any, *, grey: int = 0, box: Box | None = None, signed: bool = False, **fields: Any) -> Any:
    """Return the result of one photo of 40×30 pixels."""
    tensor = torch.from_numpy(np.asarray(values, dtype=np.float32))[None]
    photo = Image.new("RGB", (40, 30), (grey, grey, grey))
    image = vs.InputImage(photo, box or (0.0, 0.0, 40.0, 30.0), "photo")
    return vs.Attribution(tensor, vs.Grid(*tensor.shape[1:]), [image], signed=signed, **fields)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def test_the_mean_is_that_of_maps_whose_absolute_values_sum_to_1() -> None:
    maps = noise(3, 4, 5)
    scaled = [attribution(values * scale, signed=True) for values, scale in zip(maps, (1, 100, 1e-3), strict=True)]
    mean = vs.mean_maps(scaled, ["a", "a", "a"])
    expected = np.mean([values / np.abs(values).sum() for values in maps], axis=0)
    np.testing.assert_allclose(mean.values[0].numpy(), expected, atol=1e-6)
    assert (mean.signed, mean.images[0].name) == (True, "a (3 photos)")
    assert float(mean.values.abs().sum()) <= 1 + 1e-6


def test_groups_are_in_the_order_in_which_they_appear() -> None:
    results = [attribution(np.abs(noise(4, 5, seed=index)), grey=grey) for index, grey in enumerate((0, 90, 200))]
    mean = vs.mean_maps(results, ["dog", "cat", "dog"])
    assert [image.name for image in mean.images] == ["dog (2 photos)", "cat (1 photo)"]
    assert [np.asarray(image.photo).mean() for image in mean.images] == [100, 90]
    assert mean.provenance["mean_of"] == [{"group": "dog", "photos": 2}, {"group": "cat", "photos": 1}]
    np.testing.assert_allclose(mean.values[1], results[1].values[0] / results[1].values.sum(), rtol=1e-5)


def test_groups_are_the_explained_classes_by_default() -> None:
    results = [attribution(np.ones((2, 2)), target=target) for target in ("cat", "dog", "cat")]
    assert [image.name for image in vs.mean_maps(results).images] == ["cat (2 photos)", "dog (1 photo)"]
    with pytest.raises(vs.CallError, match=r"^these maps explain no class: pass groups, the class of each photo$"):
        vs.mean_maps([attribution(np.ones((2, 2)))])


def test_a_batch_equals_its_single_results(chelsea: np.ndarray) -> None:
    batch = vs.rollout(vs.load("vit-nano"), [chelsea, chelsea[:, ::-1]])
    together, apart = vs.mean_maps(batch, ["a", "a"]), vs.mean_maps(list(batch), ["a", "a"])
    torch.testing.assert_close(together.values, apart.values)
    assert together.uniform == 1 / 64
    assert together.provenance["method"] == "rollout"
    assert vs.mean_maps(vs.libra(vs.load("vit-nano"), chelsea), ["a"]).uniform is None


def test_photos_show_what_the_model_sees() -> None:
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[:, 10:30] = 100
    image = vs.InputImage(Image.fromarray(pixels), (10.0, 5.0, 30.0, 25.0))
    result = vs.Attribution(torch.ones(1, 2, 2), vs.Grid(2, 2), [image])
    (photo,) = vs.mean_maps([result], ["a"]).images
    assert photo.photo.size == (20, 20)
    assert np.asarray(photo.photo).min() == 100
    assert photo.box == (0, 0, 20, 20)


def test_finer_maps_become_as_coarse_as_the_coarsest() -> None:
    fine = np.abs(noise(6, 10))
    mean = vs.mean_maps([attribution(fine), attribution(np.zeros((3, 5)))], ["a", "b"])
    expected = fine.reshape(3, 2, 5, 2).sum((1, 3)) / fine.sum()
    np.testing.assert_allclose(mean.values[0].numpy(), expected, rtol=1e-5)
    assert mean.values[1].abs().sum() == 0


def test_reduced_results_have_the_same_mean() -> None:
    large = vs.InputImage(Image.new("RGB", (900, 600)), (0.0, 0.0, 900.0, 600.0), "photo")
    results = [
        vs.Attribution(torch.from_numpy(noise(1, 200, 300, seed=seed)).float(), vs.Grid(200, 300), [large], signed=True)
        for seed in range(2)
    ]
    small = [reduced(result) for result in results]
    assert small[0].values.shape == (1, MAX_CELLS, MAX_CELLS)
    assert max(small[0].images[0].photo.size) == MAX_PIXELS
    full, coarse = vs.mean_maps(results[:1], ["a"]).values, vs.mean_maps(small[:1], ["a"]).values
    torch.testing.assert_close(coarse / coarse.abs().sum(), full / full.abs().sum(), rtol=1e-3, atol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_maps_that_have_no_mean_are_refused() -> None:
    result = attribution(np.ones((2, 2)))
    for results, groups, message in (
        ([], [], r"results is \[\]: attributions are expected"),
        ([5], ["a"], r"results is \[5\]: attributions are expected"),
        ([result], ["a", "b"], "2 groups for 1 photos"),
        ([result, attribution(np.ones((2, 2)), signed=True)], ["a", "a"], "cannot average signed and unsigned maps"),
        ([vs.Attribution(torch.ones(1, 2, 2), vs.Grid(2, 2))], ["a"], "a result holds no photos"),
    ):
        with pytest.raises(vs.CallError, match=f"^{message}"):
            vs.mean_maps(results, groups)
