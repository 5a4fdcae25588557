"""Invalid preprocessing settings, and tensors that ignore torch's default device and dtype."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitscope.errors import CallError
from vitscope.images.image import image_of_unit
from vitscope.images.preprocessing import Preprocessing
from vitscope.images.reading import read_photo

PHOTO = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"size": (0, 224)}, "size is (0, 224): (height, width) in whole pixels from 1 to 16,384"),
        ({"size": (224, -1)}, "size is (224, -1)"),
        ({"size": (224.5, 224)}, "size is (224.5, 224)"),
        ({"size": (224, 2**14 + 1)}, "size is (224, 16385)"),
        ({"size": 224}, "size is 224"),
        ({"size": (224,)}, "size is (224,)"),
        ({"size": (3, 224, 224)}, "size is (3, 224, 224)"),
        ({"size": "ab"}, "size is 'ab'"),
        ({"size": None}, "size is None"),
        ({"resize_to": (0, 0)}, "resize_to is (0, 0)"),
        ({"resize_to": (10**9, 10**9)}, "resize_to is (1000000000, 1000000000)"),
        ({"mean": (0.5, math.nan, 0.5)}, "mean is (0.5, nan, 0.5): one finite number for each channel"),
        ({"mean": ()}, "mean is ()"),
        ({"mean": "x"}, "mean is 'x'"),
        ({"mean": ("x", "y", "z")}, "mean is ('x', 'y', 'z')"),
        ({"mean": 0.5}, "mean is 0.5"),
        ({"mean": None}, "mean is None"),
        ({"std": (0.5, 0.5, math.inf)}, "std is (0.5, 0.5, inf)"),
        ({"std": (0.5, 0.0, 0.5)}, "std is (0.5, 0.0, 0.5): the input is divided by it, so no number may be 0"),
        ({"mean": (0.5,)}, "mean has 1 numbers and std 3"),
        ({"std": (0.5,) * 4}, "mean has 3 numbers and std 4"),
        ({"fit": "bogus"}, "fit is 'bogus': choose squash or crop"),
        ({"fit": None}, "fit is None: choose squash or crop"),
        ({"resample": 99}, "resample is 99: choose one of Pillow's filters, 0 (nearest)"),
        ({"resample": "bilinear"}, "resample is 'bilinear'"),
        ({"size": tuple(range(5000))}, "…: (height, width) in whole pixels"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
@pytest.mark.usefixtures("unchecked")
def test_an_invalid_setting_is_refused_in_one_line(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(CallError) as caught:
        Preprocessing(**{"size": (224, 224), **settings})
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message
    assert len(message) < 260


@pytest.mark.usefixtures("unchecked")
def test_settings_can_be_numbers_of_any_type() -> None:
    preprocessing = Preprocessing(
        [np.int64(32), 48],  # type: ignore[arg-type]
        mean=np.array([0.5, 0.25, 0.125]),  # type: ignore[arg-type]
        std=[1, 1, 2],  # type: ignore[arg-type]
        resample=3,  # type: ignore[arg-type]
    )
    assert preprocessing == Preprocessing(
        (32, 48), (0.5, 0.25, 0.125), (1.0, 1.0, 2.0), resample=Image.Resampling.BICUBIC
    )
    assert preprocessing.size == (32, 48)
    assert preprocessing(*read_photo(PHOTO))[0].shape == (3, 32, 48)


def test_the_largest_input_is_allowed() -> None:
    assert Preprocessing((2**14, 2**14), resize_to=(2**15, 2**15)).size == (2**14, 2**14)


# Devices and dtypes


@contextlib.contextmanager
def defaults(device: str | None, dtype: torch.dtype | None) -> Iterator[None]:
    try:
        torch.set_default_device(device)
        torch.set_default_dtype(dtype or torch.float32)
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


ONE_CHANNEL = Preprocessing((24, 24), mean=(0.4,), std=(0.3,))
THREE = Preprocessing((24, 24), mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.1), fit="crop", resize_to=(28, 28))


@pytest.mark.parametrize("preprocessing", [ONE_CHANNEL, THREE], ids=["one", "three"])
@pytest.mark.parametrize(
    ("device", "dtype"),
    [("meta", None), (None, torch.float64), (None, torch.bfloat16), ("meta", torch.float64)],
    ids=str,
)
def test_defaults_of_torch_change_nothing(
    preprocessing: Preprocessing, device: str | None, dtype: torch.dtype | None
) -> None:
    pixels, _ = preprocessing.read(PHOTO)
    displayed = np.asarray(preprocessing.image_of(pixels).photo)
    factor, offset = preprocessing.affine
    unit = np.asarray(image_of_unit(pixels.clamp(0, 1)).photo)
    with defaults(device, dtype):
        again, _ = preprocessing.read(PHOTO)
        assert again.device.type == "cpu"
        assert again.dtype == torch.float32
        assert np.array_equal(again.numpy(), pixels.numpy())
        assert np.array_equal(np.asarray(preprocessing.image_of(pixels).photo), displayed)
        assert np.array_equal(np.asarray(image_of_unit(pixels.clamp(0, 1)).photo), unit)
        for tensor, before in zip(preprocessing.affine, (factor, offset), strict=True):
            assert tensor.dtype == torch.float32
            assert np.array_equal(tensor.numpy(), before.numpy())
