"""Occlusion: equal to a slow reference and to the coefficients of linear models."""

import numpy as np
import pytest
import torch

import vitscope as vs
from tests.helpers.perturbed import family, noise, outputs_of
from tests.helpers.tiny import LABELS, tiny_vit
from tests.reference import lime as slow
from tests.reference import occlusion as slow_occlusion


def patch_means(photo: np.ndarray, side: int) -> np.ndarray:
    """Return the photo with each patch in its mean colour, truncated to bytes."""
    filling = photo.copy()
    for top in range(0, photo.shape[0], side):
        for left in range(0, photo.shape[1], side):
            patch = photo[top : top + side, left : left + side]
            filling[top : top + side, left : left + side] = patch.reshape(-1, 3).mean(0).astype(np.uint8)
    return filling


@pytest.mark.parametrize("hide", [None, "grey"])
@pytest.mark.parametrize(("window", "stride"), [(1, 1), (2, 1), (2, 2), (3, 2), (4, 3)])
def test_occlusion_equals_the_slow_reference(window: int, stride: int, hide: str | None) -> None:
    """By default hidden patches have their mean colour."""
    model, photo = vs.load(tiny_vit(), image_size=(32, 48)), noise(64, 96)
    filling = patch_means(photo, 16) if hide is None else np.uint8(128)

    def output(hidden: np.ndarray) -> float:
        covered = hidden.repeat(16, 0).repeat(16, 1)[..., None]
        return float(outputs_of(model, model.prepare(np.where(covered, filling, photo))[0])[0, 2])

    options = {} if hide is None else {"hide": hide}
    result = vs.occlusion(model, photo, target=2, window=window, stride=stride, **options)
    expected = slow_occlusion.occlusion(output, 4, 6, window, stride)
    assert result.values.shape == (1, 4, 6)
    assert result.values[0].numpy() == pytest.approx(expected, abs=1e-6)
    assert (result.target, result.signed) == (LABELS[2], True)


def test_occlusion_of_a_linear_model_gives_its_coefficients() -> None:
    """The model's output is the sum over its cells."""
    coefficients = np.random.default_rng(0).normal(size=(8, 2))
    labels = slow.stripes(4) + 4 * (np.arange(8) // 4)[:, None]
    module = slow.linear(labels, coefficients)
    model = vs.load(module, image_size=(8, 16), patch_size=4, readout="patches")
    result = vs.occlusion(model, slow.WHITE, target=1, hide="black", output="logit")
    assert result.values[0].numpy().ravel() == pytest.approx(coefficients[:, 1], abs=1e-5)
    pairs = vs.occlusion(model, slow.WHITE, target=1, hide="black", output="logit", window=2)
    twin = slow_occlusion.occlusion(lambda hidden: float((~hidden).ravel() @ coefficients[:, 1]), 2, 4, 2, 1)
    assert pairs.values[0].numpy() == pytest.approx(twin, abs=1e-5)


def test_a_window_over_the_entire_image_gives_the_total_drop() -> None:
    model, pixels = family("torchvision-vit").model(), family("torchvision-vit").pixels(1)
    result = vs.occlusion(model, pixels, target=0, window=4, hide="black", output="logit")
    black = torch.zeros_like(pixels)
    black[:] = (-torch.tensor(model.preprocessing.mean) / torch.tensor(model.preprocessing.std)).view(1, 3, 1, 1)
    drop = outputs_of(model, pixels, "logit")[0, 0] - outputs_of(model, black, "logit")[0, 0]
    assert result.values[0].numpy() == pytest.approx(np.full((4, 4), drop), abs=1e-5)
    assert result.provenance["samples"] == 1


def test_a_patch_of_one_colour_is_no_evidence() -> None:
    """The empty corners of a scan stay as they are, so they cannot be the strongest patches."""
    model, photo = vs.load(tiny_vit(), image_size=(32, 48)), noise(64, 96)
    photo[:16, :16], photo[48:, 80:] = 0, (7, 90, 200)
    values = vs.occlusion(model, photo, target=2).values[0]
    assert (values == 0).nonzero().tolist() == [[0, 0], [3, 5]]
    assert (vs.occlusion(model, photo, target=2, hide="grey").values != 0).all()
