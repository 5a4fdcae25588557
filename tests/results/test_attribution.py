"""Results: overlays, saved files, batches."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import vitscope as vs
from vitscope.results import colours, saved_arrays
from vitscope.results.colours import blend, colour_scale, stretch
from vitscope.validation import require_finite_tensor

GRID = vs.Grid(2, 3, prefix=1)
PROVENANCE = {
    "method": "rollout",
    "parameters": {"discard_ratio": 0.5},
    "versions": {"torch": "2"},
    "row_sums": [1.0, 1.0],
}


@pytest.fixture
def result(chelsea: np.ndarray) -> vs.Attribution:
    """Return a result of two photos of different sizes; the model saw only the middle of the second."""
    photo = Image.fromarray(chelsea)
    images = [
        vs.InputImage(photo, (0.0, 0.0, 451.0, 300.0)),
        vs.InputImage(photo.resize((120, 80)), (20.0, 0.0, 100.0, 80.0)),
    ]
    values = torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(0))
    return vs.Attribution(values, GRID, images, PROVENANCE, "tabby")


def colour(value: float) -> np.ndarray:
    return np.array(matplotlib.colormaps[colours.COLORMAP](value)[:3]) * 255


def test_the_overlay_has_the_photos_size(result: vs.Attribution) -> None:
    for index, size in ((0, (451, 300)), (1, (120, 80)), (-1, (120, 80))):
        image = result.overlay(index=index)
        assert (image.mode, image.size) == ("RGB", size)
    assert np.array_equal(result.overlay(), result.overlay(0.6, index=0))


def test_alpha_fades_from_the_photo_to_the_map(result: vs.Attribution) -> None:
    photo = np.asarray(result.images[0].photo, dtype=float)
    clear, half, full = (np.asarray(result.overlay(alpha), dtype=float) for alpha in (0.0, 0.5, 1.0))
    assert np.array_equal(clear, photo)
    assert np.abs(half - (photo + full) / 2).max() <= 1
    # The centres of the patches with the smallest and the largest value.
    order = result.values[0].flatten().argsort()
    for patch, value in ((int(order[0]), 0.0), (int(order[-1]), 1.0)):
        y, x = 75 + 150 * (patch // 3), 75 + 150 * (patch % 3)
        assert np.abs(full[y, x] - colour(value)).max() < 8


def test_pixels_that_the_model_did_not_see_are_grey(result: vs.Attribution) -> None:
    image = np.asarray(result.overlay(index=1)).astype(int)
    outside = np.concatenate([image[:, :20], image[:, 100:]], axis=1)
    assert (np.ptp(outside, axis=-1) == 0).all()
    assert outside.min() >= 160
    assert (np.ptp(image[:, 20:100], axis=-1) > 0).mean() > 0.99


@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan"), float("inf")])
def test_an_alpha_out_of_range_is_refused(result: vs.Attribution, alpha: float) -> None:
    with pytest.raises(vs.CallError, match=rf"alpha is {re.escape(str(alpha))}, a number between 0 and 1"):
        result.overlay(alpha)


@pytest.mark.parametrize("index", [2, -3])
def test_an_index_out_of_range_is_refused(result: vs.Attribution, index: int, tmp_path: Path) -> None:
    with pytest.raises(vs.CallError, match=f"image {index} does not exist: this result has images 0 to 1"):
        result.overlay(index=index)
    with pytest.raises(vs.CallError, match=f"image {index} does not exist"):
        result.save(tmp_path / "map.png", index=index)
    assert list(tmp_path.iterdir()) == []


def test_safetensors_can_be_read_back(result: vs.Attribution, tmp_path: Path) -> None:
    path = result.save(tmp_path / "new folder" / "map.safetensors")
    assert path == tmp_path / "new folder" / "map.safetensors"
    loaded = vs.Attribution.load(path)
    assert torch.equal(loaded.values, result.values)
    assert loaded.values.dtype == torch.float32
    assert (loaded.grid, loaded.target, loaded.images) == (GRID, "tabby", ())
    assert loaded.provenance == {**PROVENANCE, "photos": result.photo_records()}
    with pytest.raises(vs.CallError, match="loaded from a file and holds no photos"):
        loaded.overlay()
    loaded.save(path)
    assert torch.equal(vs.Attribution.load(str(path)).values, result.values)


def test_values_that_are_a_view_are_saved_correctly(tmp_path: Path) -> None:
    values = torch.arange(12.0).view(3, 2, 2).permute(1, 2, 0)
    result = vs.Attribution(values, GRID)
    loaded = vs.Attribution.load(result.save(tmp_path / "map.safetensors"))
    assert torch.equal(loaded.values, values)
    assert loaded.target is None


def test_npz_holds_the_whole_batch(result: vs.Attribution, tmp_path: Path) -> None:
    with np.load(result.save(tmp_path / "map.npz")) as file:
        assert set(file) == {"values", "about"}
        assert np.array_equal(file["values"], result.values.numpy())
        metadata = json.loads(str(file["about"]))
    grid = {"height": 2, "width": 3, "prefix": 1}
    provenance = {**PROVENANCE, "photos": result.photo_records()}
    assert metadata == {"grid": grid, "provenance": provenance, "target": "tabby", "signed": False}


def test_a_png_is_the_overlay(result: vs.Attribution, tmp_path: Path) -> None:
    with Image.open(result.save(tmp_path / "map.png", index=1)) as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), np.asarray(result.overlay(index=1)))
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]


@pytest.mark.parametrize("name", ["map.jpg", "map", "map.pt", ".png"])
def test_unknown_suffixes_are_refused(result: vs.Attribution, name: str, tmp_path: Path) -> None:
    with pytest.raises(vs.CallError, match=r"cannot save as .*: end the name in \.png, \.safetensors, \.npz or \.json"):
        result.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


WRITERS: dict[str, tuple[Any, str]] = {
    ".png": (Image.Image, "save"),
    ".npz": (np, "savez"),
    ".safetensors": (saved_arrays, "save_file"),
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_failed_write_keeps_the_older_file(
    result: vs.Attribution, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer fails half-way, as on a full disk."""
    path = tmp_path / f"map{suffix}"
    result.save(path)
    before = path.read_bytes()
    owner, name = WRITERS[suffix]

    def fail_half_way(*arguments: Any, **_: Any) -> None:
        target = next(argument for argument in arguments if isinstance(argument, Path))
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(owner, name, fail_half_way)
    with pytest.raises(vs.WorkError, match=r"cannot write .*: No space left on device") as caught:
        result.save(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_place_of_a_folder_is_refused(result: vs.Attribution, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a note")
    for suffix in WRITERS:
        with pytest.raises(vs.VitscopeError) as caught:
            result.save(tmp_path / "taken" / f"map{suffix}")
        assert "\n" not in str(caught.value)
    assert (tmp_path / "taken").read_text() == "a note"


def no_metadata(path: Path) -> None:
    save_file({"values": torch.zeros(1, 2, 3)}, path)


def metadata(text: str) -> Callable[[Path], None]:
    return lambda path: save_file({"values": torch.zeros(1, 2, 3)}, path, {"about": text})


BROKEN: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no tensors here, only words"),
    "folder": lambda path: path.mkdir(),
    "other tensors": lambda path: save_file({"weight": torch.zeros(1)}, path, {"about": "{}"}),
    "no metadata": no_metadata,
    "no JSON": metadata("rollout"),
    "no grid": metadata('{"provenance": {}, "target": null}'),
    "another grid": metadata('{"grid": {"rows": 2}, "provenance": {}, "target": null}'),
    "a list": metadata("[]"),
}


@pytest.mark.parametrize("write", BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_not_a_result_is_refused(write: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "map.safetensors"
    write(path)
    with pytest.raises(vs.WorkError, match=r"map\.safetensors is not a saved result") as caught:
        vs.Attribution.load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_a_call_error(tmp_path: Path) -> None:
    with pytest.raises(vs.CallError, match="does not exist"):
        vs.Attribution.load(tmp_path / "map.safetensors")


def test_stretch_scales_to_zero_and_one() -> None:
    nan = float("nan")
    values = np.array([[2.0, 4.0], [nan, 3.0]])
    np.testing.assert_array_equal(stretch(values), [[0, 1], [nan, 0.5]])
    np.testing.assert_array_equal(values, [[2, 4], [nan, 3]])
    np.testing.assert_array_equal(stretch(np.array([[-3.0, -3.0], [nan, -3.0]])), [[0, 0], [nan, 0]])
    assert np.isnan(stretch(np.full((2, 2), nan))).all()


def test_blend_mixes_photo_and_colours() -> None:
    photo = Image.new("RGB", (2, 1), (100, 0, 200))
    heat = np.array([[1.0, float("nan")]])
    seen, unseen = np.asarray(blend(photo, heat, 0.25))[0].astype(float)
    assert np.abs(seen - (0.75 * np.array([100, 0, 200]) + 0.25 * colour(1.0))).max() <= 0.5
    assert unseen.tolist() == [195, 195, 195]  # 0.35 of the mean, lightened by 160
    assert photo.getpixel((0, 0)) == (100, 0, 200)


def test_a_constant_map_is_drawn_without_a_warning(result: vs.Attribution) -> None:
    flat = vs.Attribution(torch.full((2, 2, 3), 0.5), GRID, result.images)
    assert np.abs(np.asarray(flat.overlay(1.0), dtype=float) - colour(0.0)).max() <= 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused(value: float) -> None:
    values = torch.zeros(2, 3)
    assert require_finite_tensor(values, "rollout") is values
    values[1, 2] = value
    with pytest.raises(vs.WorkError, match="rollout came out as NaN or infinity"):
        require_finite_tensor(values, "rollout")


def test_json_has_the_values_and_the_provenance(result: vs.Attribution, tmp_path: Path) -> None:
    saved = json.loads(result.save(tmp_path / "map.json").read_text())
    assert saved["values"] == result.values.tolist()
    assert (saved["target"], saved["provenance"]["method"]) == ("tabby", "rollout")


def test_a_batch_can_be_split_into_images_and_joined_again(result: vs.Attribution) -> None:
    first, second = result
    assert torch.equal(second.values, result.values[1:])
    assert second.images == [result.images[1]]
    assert torch.equal(result[-1].values, second.values)
    joined = vs.Attribution.join([first, second])
    assert torch.equal(joined.values, result.values)
    assert list(joined.images) == list(result.images)
    with pytest.raises(vs.CallError, match="has images 0 to 1"):
        result[2]


def test_results_of_different_sizes_cannot_be_joined(result: vs.Attribution) -> None:
    square = vs.Attribution(torch.rand(1, 3, 3), vs.Grid(3, 3), result.images[:1], PROVENANCE)
    with pytest.raises(
        vs.CallError, match=r"^cannot combine results of different sizes \(2×3, 3×3\): explain these images separately$"
    ):
        vs.Attribution.join([result[0], square])


def test_a_signed_map_is_blue_below_zero_white_at_zero_and_red_above() -> None:
    values_of_map = np.array([-1.0, 0.0, 4.0])
    assert stretch(values_of_map, colour_scale(values_of_map, signed=True).limits).tolist() == [0.375, 0.5, 1.0]
    photo = Image.new("RGB", (30, 20), "white")
    values = torch.tensor([[[-1.0, 0.0, 1.0]]])
    image = vs.InputImage(photo, (0.0, 0.0, 30.0, 20.0))
    signed = vs.Attribution(values, vs.Grid(1, 3), [image], {}, "tabby", True)
    colours = np.asarray(signed.overlay(1.0)).astype(int)
    (red, _, blue), middle = colours[10, 2], colours[10, 14]
    assert blue > red + 50, "opposing values are blue"
    assert colours[10, 28, 0] > colours[10, 28, 2] + 50, "supporting values are red"
    assert middle.min() > 235, "zero is white"
    assert signed[0].signed


def test_a_saved_result_stays_signed(result: vs.Attribution, tmp_path: Path) -> None:
    signed = vs.Attribution(result.values, GRID, (), PROVENANCE, "tabby", True)
    assert vs.Attribution.load(signed.save(tmp_path / "map.safetensors")).signed
    assert not vs.Attribution.load(result.save(tmp_path / "unsigned.safetensors")).signed
