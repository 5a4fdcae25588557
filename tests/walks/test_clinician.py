"""A clinician's walk: medical files, regions, a check for leaks, and maps of dark images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vitscope as vs
from tests.helpers.command_line import call, needs_bundled, printed_results

pytestmark = [pytest.mark.slow, needs_bundled]
TUMOUR = "tumour=70,30,20,20"


def slice_of_a_head(seed: int, side: int = 128) -> np.ndarray:
    """Return 12-bit grey values (height, width): a bright spot in an ellipse, and black corners."""
    rows, columns = np.mgrid[:side, :side]
    head = ((rows - 64) / 50) ** 2 + ((columns - 64) / 42) ** 2 < 1
    spot = ((rows - 40) / 9) ** 2 + ((columns - 80) / 9) ** 2 < 1
    texture = np.random.default_rng(seed).integers(-150, 150, (side, side))
    return np.where(spot, 3600, np.where(head, 1400 + texture, 0)).astype(np.uint16)


@pytest.fixture(name="slices")
def class_folders(tmp_path, monkeypatch):
    """Return a folder of 16-bit PNG files in class folders, one of which is in both classes."""
    monkeypatch.chdir(tmp_path)
    for index in range(8):
        path = Path("mri", ("glioma", "healthy")[index % 2], f"{index}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(slice_of_a_head(index)).save(path)
    return "mri"


def test_values_of_twelve_bits_are_named_and_a_window_shows_them(slices, capsys, monkeypatch):
    path = f"{slices}/glioma/0.png"
    _, out, err = call(capsys, monkeypatch, "rollout", path, "--no-figure")
    assert "--window" in out + err
    code, out, err = call(capsys, monkeypatch, "rollout", path, "--no-figure", "--window", "0,4095", "--json")
    assert (code, err) == (0, "")
    (entry,) = printed_results(out)
    windowed = vs.rollout(vs.load("vit-nano"), vs.read_image(path, window=(0, 4095)))
    np.testing.assert_allclose(entry["rollouts"][0]["values"], np.asarray(windowed)[0], atol=1e-6)


def test_a_folder_of_dicom_files_is_explained(tmp_path, capsys, monkeypatch):
    pytest.importorskip("pydicom")
    from tests.images.test_dicom import dicom

    monkeypatch.chdir(tmp_path)
    Path("study").mkdir()
    for index in range(2):
        Path(f"study/{index}.dcm").write_bytes(dicom(slice_of_a_head(index)))
    arguments = ("rollout", "study", "--window", "0,4095", "--region", TUMOUR, "--out", "maps", "--dpi", "60")
    code, out, err = call(capsys, monkeypatch, *arguments)
    assert (code, "Traceback" in err) == (0, False)
    assert {"0-rollout.png", "1-rollout.png", "summary.csv"} <= {path.name for path in Path("maps").iterdir()}
    assert "tumour" in out


def test_a_region_is_compared_with_its_area_and_with_shifted_regions(slices, capsys, monkeypatch):
    arguments = ("rollout", f"{slices}/glioma", "--window", "0,4095", "--region", TUMOUR, "--region", "border")
    code, out, _ = call(capsys, monkeypatch, *arguments, "--no-figure", "--json")
    assert code == 0
    *entries, mean = printed_results(out)
    assert len(entries) == 4
    assert {row["photos"] for rows in mean["region_means"].values() for row in rows} == {4}
    for entry in entries:
        (rows, *_) = entry["regions"].values()
        assert [row["region"] for row in rows] == ["tumour", "border"]
        for row in rows:
            assert 0 <= row["share"] <= 1
            assert row["ratio"] == pytest.approx(row["share"] / row["area"], rel=1e-4)
            assert len(row["random_interval"]) == 2


def test_occlusion_of_a_dark_image_finds_nothing_in_black_corners():
    grey = (slice_of_a_head(0) / 16).astype(np.uint8)
    image = np.stack([grey] * 3, -1)
    model = vs.load("vit-nano")
    values = np.abs(np.asarray(vs.occlusion(model, image))[0])
    patches = grey.reshape(8, 16, 8, 16).transpose(0, 2, 1, 3).reshape(8, 8, -1)
    empty = patches.max(-1) == 0
    assert empty.sum() >= 8
    assert values[empty].max() < 0.05 * values.max()
    with_grey = np.abs(np.asarray(vs.occlusion(model, image, hide="grey"))[0])
    assert with_grey[empty].max() > 0.2 * with_grey.max()  # why grey is not the default


def test_a_leak_is_named_with_its_files(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split, indices in (("train", range(6)), ("test", (0, 7, 6, 1))):
        for index in indices:
            path = Path("split", split, ("glioma", "healthy")[index % 2], f"{index}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = np.random.default_rng(index).integers(0, 255, (8, 8)).astype(np.uint8)
            Image.fromarray(coarse.repeat(8, 0).repeat(8, 1)).save(path)
    code, out, err = call(capsys, monkeypatch, "data", "split", "--out", "leaks.png")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) <= 30
    assert "2 training images" in out
    with Image.open("leaks.png") as figure:
        assert figure.width <= 2400
    assert len(vs.check_data(vs.load_data("split")).leaking) == 2
