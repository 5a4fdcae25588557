"""The ends of a map's colours: ordinary maps, outliers, signed maps, and maps that are nearly flat."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import vitscope as vs
from vitscope.results.colours import blend, colour_scale

UNIFORM = 1 / 401


def ramp(*outliers: float) -> np.ndarray:
    """Return 400 values from 1 to 2, the last of which are outliers."""
    values = np.linspace(1, 2, 400)
    values[len(values) - len(outliers) :] = outliers
    return values.reshape(20, 20)


def test_an_ordinary_map_is_coloured_from_its_lowest_to_its_highest_value() -> None:
    for values in (ramp(), ramp(5.9), ramp(*[40.0] * 30)):
        scale = colour_scale(values, uniform=UNIFORM)
        assert scale.limits == (1.0, values.max())
        assert (scale.note, scale.outliers) == ("", 0)
    assert colour_scale(-ramp(), signed=True).limits == (-2.0, 2.0)


def test_a_few_outliers_lie_beyond_the_scale() -> None:
    values = ramp(50.0)
    scale = colour_scale(values, uniform=UNIFORM)
    expected = np.sort(values.ravel())[int(0.995 * 399)]
    assert scale.limits == (1.0, pytest.approx(expected))
    assert scale.outliers == (values > expected).sum() == 2
    assert scale.note == "2 of 400 patches lie beyond the scale: up to 33 × the median"


def test_a_single_outlier_of_a_small_grid_is_named() -> None:
    values = np.linspace(1, 2, 196).reshape(14, 14)
    values[3, 4] = 51.0
    scale = colour_scale(values)
    assert scale.limits == (1.0, 2.0)
    assert scale.note == "1 of 196 values lies beyond the scale: 34 × the median"


def test_signed_outliers_leave_the_scale_symmetric() -> None:
    values = ramp() - 1.5
    values[3, 3] = -50.0
    low, high = colour_scale(values, signed=True).limits or (0.0, 0.0)
    assert low == -high
    assert high == pytest.approx(0.5, abs=0.01)


def test_a_map_of_zeros_with_outliers_is_compared_with_its_scale() -> None:
    values = np.zeros((20, 20))
    values[0, :5], values[1, 0] = 1.0, 8.0
    assert colour_scale(values).note == "1 of 400 values lies beyond the scale: 8 × its end"


def test_small_maps_and_segments_have_no_outliers() -> None:
    small = np.array([[0.0, 1.0], [1.0, 100.0]])
    assert colour_scale(small).limits == (0.0, 100.0)
    assert colour_scale(ramp(50.0), clip=False).limits == (1.0, 50.0)


def test_nearly_flat_attention_is_drawn_nearly_flat() -> None:
    values = np.linspace(0.0049, 0.0053, 100).reshape(10, 10)
    scale = colour_scale(values, uniform=UNIFORM)
    assert scale.limits == (0.0, pytest.approx(0.0102))
    assert scale.note == "nearly the same everywhere: highest 1.08 × lowest"
    assert colour_scale(values).limits == (0.0049, 0.0053), "only the values of attention have a meaningful zero"
    assert not colour_scale(np.linspace(1, 1.11, 100).reshape(10, 10), uniform=UNIFORM).note


@pytest.mark.parametrize("values", [np.full((3, 3), 0.25), np.zeros((3, 3)), np.full((3, 3), np.nan)])
def test_a_constant_map_has_no_scale(values: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for signed in (False, True):
            assert colour_scale(values, signed=signed, uniform=UNIFORM).limits is None


def test_nan_is_ignored() -> None:
    values = ramp()
    values[0, 0] = np.nan
    assert colour_scale(values).limits == (np.nanmin(values), 2.0)


def attention(values: np.ndarray, **provenance: bool) -> vs.Attribution:
    image = vs.InputImage.from_photo(Image.new("RGB", (40, 40), "white"))
    tensor = torch.tensor(values, dtype=torch.float32, device="cpu")[None]
    return vs.Attribution(tensor, vs.Grid(*values.shape, prefix=1), [image], provenance)


def test_the_overlay_shows_more_than_its_outlier() -> None:
    values = ramp(50.0)
    result = attention(values, rows_sum_to_one=True)
    pixels = np.asarray(result.overlay(1.0)).astype(int).sum(-1)
    assert pixels[4:36, 4:36].max() > 500, "the highest of the ordinary values is bright"
    assert result.colour_scale().note.startswith("2 of 400 patches")


def test_the_overlay_of_nearly_flat_attention_has_one_colour() -> None:
    values = np.linspace(0.0049, 0.0053, 100).reshape(10, 10)
    flat, other = (
        np.asarray(attention(values, **record).overlay(1.0)).astype(int)
        for record in ({"rows_sum_to_one": True}, {"rows_sum_to_one": False})
    )
    assert np.ptp(flat.reshape(-1, 3), axis=0).max() < 30
    assert np.ptp(other.reshape(-1, 3), axis=0).max() > 150


def test_uniform_attention_counts_all_tokens() -> None:
    assert attention(ramp(), rows_sum_to_one=True).uniform == 1 / 401
    assert attention(ramp(), rows_sum_to_one=False).uniform is None
    assert attention(ramp()).uniform is None


def test_numpy_reads_a_result() -> None:
    result = attention(ramp())
    array = np.asarray(result)
    assert (array.shape, array.dtype) == ((1, 20, 20), np.float32)
    np.testing.assert_array_equal(array, result.values.numpy())
    assert np.asarray(result, dtype=np.float64).dtype == np.float64
    assert np.mean(result) == pytest.approx(float(result.values.mean()))


def test_numpy_copies_a_result_only_if_it_has_to() -> None:
    result = attention(ramp())
    assert np.shares_memory(np.asarray(result), result.values.numpy())
    assert not np.shares_memory(np.array(result, copy=True), result.values.numpy())
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        assert np.shares_memory(np.array(result, copy=False), result.values.numpy())
        with pytest.raises(ValueError, match="the values are float32: an array of float64 is a copy"):
            np.array(result, dtype=np.float64, copy=False)


def test_the_photo_under_a_signed_map_is_grey_in_any_colours() -> None:
    photo, heat = Image.new("RGB", (1, 1), (30, 60, 210)), np.ones((1, 1))
    assert blend(photo, heat, 0.0, signed=True, colormap="PuOr").getpixel((0, 0)) == (100, 100, 100)
    assert blend(photo, heat, 0.0, colormap="viridis").getpixel((0, 0)) == (30, 60, 210)
