"""Saved results recognise their photos: names, sizes, boxes and hashes."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitscope as vs
from vitscope.results.saved_photos import check_provenance

BOX = (3.0, 0.0, 17.5, 24.0)


def pixels(width: int, height: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(name="files")
def saved_photos(tmp_path: Path) -> list[Path]:
    (tmp_path / "cats").mkdir()
    paths = [tmp_path / "cats/a.png", tmp_path / "b.png"]
    for path, array in zip(paths, (pixels(20, 24, 0), pixels(36, 24, 1)), strict=True):
        Image.fromarray(array).save(path)
    return paths


@pytest.fixture(name="result")
def result_of_two_photos(files: list[Path]) -> vs.Attribution:
    images = [
        vs.InputImage(Image.open(files[0]).convert("RGB"), BOX, str(files[0])),
        vs.InputImage.from_photo(Image.open(files[1]).convert("RGB"), str(files[1])),
    ]
    values = torch.rand(2, 2, 3, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    return vs.Attribution(values, vs.Grid(2, 3), images, {"method": "rollout", "model": "m"}, "cat")


@pytest.fixture(name="loaded")
def loaded_result(result: vs.Attribution, tmp_path: Path) -> vs.Attribution:
    return vs.Attribution.load(result.save(tmp_path / "map.safetensors"))


def test_the_provenance_describes_the_photos(loaded: vs.Attribution) -> None:
    first, second = loaded.provenance["photos"]
    digest = hashlib.sha256("20×24".encode() + pixels(20, 24, 0).tobytes()).hexdigest()
    assert first == {"name": "a.png", "size": [20, 24], "box": list(BOX), "sha256": digest}
    assert (second["name"], second["size"], second["box"]) == ("b.png", [36, 24], [0.0, 0.0, 36.0, 24.0])
    assert json.loads(json.dumps(loaded.as_json()["provenance"])) == loaded.provenance


def test_a_loaded_result_is_drawn_with_its_photos(
    result: vs.Attribution, loaded: vs.Attribution, files: list[Path]
) -> None:
    for photos in (files, files[::-1], [*files, pixels(9, 9, 2)], [pixels(36, 24, 1), pixels(20, 24, 0)]):
        attached = loaded.with_photos(photos)
        assert [image.box for image in attached.images] == [image.box for image in result.images]
        for index in range(2):
            assert attached.overlay(index=index).tobytes() == result.overlay(index=index).tobytes()
    assert [image.name for image in loaded.with_photos(files).images] == [str(path) for path in files]
    assert loaded.images == ()


def test_other_pixels_are_refused(loaded: vs.Attribution, files: list[Path]) -> None:
    changed = pixels(20, 24, 0)
    changed[5, 5, 1] ^= 1
    message = r"^none of these 2 images has the pixels of a\.png \(20×24\): pass this photo$"
    for photos in ([changed, files[1]], [pixels(20, 24, 0).reshape(20, 24, 3), files[1]]):
        with pytest.raises(vs.CallError, match=message):
            loaded.with_photos(photos)
    unknown = vs.Attribution(loaded.values, loaded.grid)
    with pytest.raises(vs.CallError, match="does not describe its photos"):
        unknown.with_photos(files)


def test_parts_and_joins_of_loaded_results_keep_their_records(
    loaded: vs.Attribution, files: list[Path], tmp_path: Path
) -> None:
    second = loaded[1]
    assert second.provenance["photos"] == loaded.provenance["photos"][1:]
    assert len(second.with_photos(files[1]).images) == 1
    joined = vs.Attribution.join([loaded[1], loaded[0]])
    assert joined.provenance["photos"] == loaded.provenance["photos"][::-1]
    assert "images" not in joined.provenance
    again = vs.Attribution.load(joined.save(tmp_path / "again.safetensors"))
    assert [record["name"] for record in again.photo_records()] == ["b.png", "a.png"]


@pytest.mark.parametrize(
    "change",
    [
        lambda records: records.pop(),
        lambda records: records[0].update(size=[1]),
        lambda records: records[0].update(size=[0, 5]),
        lambda records: records[0].update(box=["0", 0, 1, 1]),
        lambda records: records[0].update(name=None),
        lambda records: records[0].update(sha256=5),
        lambda records: records[0].pop("box"),
        lambda records: records.__setitem__(0, "a.png"),
    ],
)
def test_wrong_records_are_refused(loaded: vs.Attribution, change: Callable[[list[Any]], Any]) -> None:
    provenance = json.loads(json.dumps(loaded.provenance))
    check_provenance(provenance, 2)
    change(provenance["photos"])
    with pytest.raises((ValueError, KeyError, TypeError)):
        check_provenance(provenance, 2)


def test_a_loaded_map_is_judged_like_a_new_one(tmp_path: Path, chelsea: np.ndarray) -> None:
    model = vs.load("vit-nano")
    result = vs.occlusion(model, chelsea)
    loaded = vs.Attribution.load(result.save(tmp_path / "map.safetensors")).with_photos(chelsea)
    photo = loaded.images[0].photo
    expected, actual = (vs.faithfulness(model, image, r, steps=2) for image, r in ((chelsea, result), (photo, loaded)))
    assert actual.deletion == pytest.approx(expected.deletion)
    assert len(result.provenance["weights_sha256"]) == 64
    assert loaded.provenance["preprocessing"]["size"] == [32, 32]
