"""The option --region: tables, JSON, summary, figures and mean maps, and refusals."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vitscope as vs
from tests.helpers.command_line import call, needs_bundled, photo_in_an_empty_folder
from vitscope.cli.marks import parse_mark, parse_name

pytestmark = needs_bundled
photo = photo_in_an_empty_folder
BOX, REGION = (105, 60, 235, 190), "face=105,60,235,190"


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(name="batch")
def class_folders(photo):
    """Return a folder of four photos in two class folders, and write a mask for two of them."""
    with Image.open(photo) as file:
        image = file.copy()
    for index, name in enumerate(("cats/a", "cats/b", "dogs/a", "dogs/b")):
        path = Path(f"pics/{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        image.crop((20 * index, 0, 400 + 10 * index, 280)).save(path)
    for name in ("cats/a", "dogs/b"):
        with Image.open(f"pics/{name}.png") as file:
            mask = np.zeros((file.height, file.width), np.uint8)
        mask[50:150, 100:200] = 255
        Path(f"masks/{name}.png").parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(f"masks/{name}.png")
    return "pics"


def summary_rows(path="figures/summary.csv"):
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_and_the_json_are_those_of_region_shares(capsys, monkeypatch, photo, chelsea):
    code, out, _ = call(capsys, monkeypatch, "rollout", photo, "--region", REGION, "--region", "border", "-o", "a.png")
    assert code == 0
    shares = vs.region_shares(vs.rollout(vs.load("vit-nano"), chelsea), {"face": BOX, "border": "border"})
    lines = [line.split() for line in out.splitlines()]
    for row in shares.rows():
        (line,) = [cells for cells in lines if row.region in cells and "mean" in cells]
        values = (f"{row.share:.1%}", f"{row.area:.1%}", f"{row.ratio:.2f}", f"{row.p_value:.3f}")
        assert all(value in line for value in values)
        assert "{:.2f} to {:.2f}".format(*row.random_interval) in " ".join(line)
    code, out, _ = call(
        capsys, monkeypatch, "rollout", photo, "--region", REGION, "--region", "border", "--json", "-o", "b.png"
    )
    (entry,) = json.loads(out)["results"]
    entries = entry["regions"]["rollout, mean of heads"]
    for entry, row in zip(entries, shares.rows(), strict=True):
        assert (entry["region"], entry["part"], entry["photos"]) == (row.region, row.part, 1)
        values = (row.share, row.area, row.ratio, row.p_value, *row.random_interval)
        saved = (*(entry[name] for name in ("share", "area", "ratio", "p_value")), *entry["random_interval"])
        assert saved == pytest.approx(values, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "options", "maps"),
    [
        ("lime", ("--segments", "patches", "-n", "80"), ["lime"]),
        (
            "lime",
            ("--segments", "patches", "-n", "80", "--compare", "swin-nano"),
            ["lime, vit-nano", "lime, swin-nano"],
        ),
        ("explain", ("--method", "libra,grad_cam"), ["libra", "grad_cam"]),
        ("explain", (), ["libra", "rollout, mean of heads", "rollout, max of heads"]),
        ("attention", ("--layer", "2"), ["attention, layer 2"]),
        ("attention", ("--model", "swin-nano"), [f"attention, layer {layer}" for layer in range(5)]),
        ("rollout", ("--head-fusion", "max"), ["rollout, max of heads"]),
    ],
)
def test_every_map_is_measured(capsys, monkeypatch, photo, command, options, maps):
    code, out, err = call(capsys, monkeypatch, command, photo, *options, "--region", REGION, "--json", "-o", "a.png")
    assert code == 0, err
    (entry,) = json.loads(out)["results"]
    assert code == 0
    assert list(entry["regions"])[: len(maps)] == maps
    for rows in entry["regions"].values():
        assert {row["region"] for row in rows} == {"face"}
        assert all(row["area"] == pytest.approx(0.33, abs=0.01) for row in rows)


def test_without_regions_nothing_is_measured(capsys, monkeypatch, photo):
    code, out, _ = call(capsys, monkeypatch, "rollout", photo, "--json", "-o", "a.png")
    assert (code, "regions" in json.loads(out)["results"][0]) == (0, False)
    code, out, _ = call(capsys, monkeypatch, "rollout", photo, "-o", "b.png")
    assert (code, out) == (0, "wrote b.png\n")


def test_the_figure_outlines_the_region(capsys, monkeypatch, photo):
    scenes = []
    monkeypatch.setattr("vitscope.cli.rollout.save", lambda scene, *_: scenes.append(scene))
    call(capsys, monkeypatch, "rollout", photo, "--region", REGION)
    outlines = [panel.outlines for row in scenes[0].rows for panel in row.panels]
    assert outlines
    for (outline,) in outlines:
        assert outline.name == "face"
        assert outline.mask.sum() == BOX[2] * BOX[3]
        assert outline.mask[60:250, 105:340].all()


def test_a_report_has_the_table(capsys, monkeypatch, photo):
    code, _, _ = call(capsys, monkeypatch, "rollout", photo, "--region", REGION, "-o", "a.html")
    page = Path("a.html").read_text(encoding="utf-8")
    assert code == 0
    assert "<h2>Regions</h2>" in page
    assert "<td>face</td>" in page
    assert "not that the region caused the output" in page


@pytest.mark.slow
def test_a_folder_has_means_by_class_and_a_summary(capsys, monkeypatch, batch):
    options = ("--head-fusion", "mean", "--region", "border", "--region", "spot=masks", "--group-by", "folder")
    code, out, err = call(capsys, monkeypatch, "rollout", batch, *options, "--out", "figures")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "wrote figures/rollout-regions.png" in lines
    with Image.open("figures/rollout-regions.png") as figure:
        assert figure.width > 500
    start = lines.index("shares of regions, rollout, mean of heads, by folder (number of photos):")
    assert start > lines.index("wrote figures/summary.csv")
    model, paths = vs.load("vit-nano"), [f"pics/{name}.png" for name in ("cats/a", "cats/b", "dogs/a", "dogs/b")]
    masks = [f"masks/{name}.png" if name else None for name in ("cats/a", "", "", "dogs/b")]
    results = vs.rollout(model, paths)
    shares = vs.region_shares(results, {"border": "border", "spot": [mask and Path(mask) for mask in masks]})
    for group, index, region, share in (
        ("cats (2)", slice(0, 2), "border", shares.share[:2, 0, 0].mean()),
        ("dogs (2)", slice(2, 4), "border", shares.share[2:, 0, 0].mean()),
        ("cats ", slice(0, 1), "spot", shares.share[0, 0, 1]),
        ("all photos (4)", slice(0, 4), "border", shares.share[:, 0, 0].mean()),
        ("all photos (2)", slice(0, 4), "spot", np.nanmean(shares.share[:, 0, 1])),
    ):
        (line,) = [line for line in lines[start:] if line.strip().startswith(group) and f" {region} " in line]
        assert f" {share:.1%} " in line, index
    by_file = summary_rows()
    assert [row["border: share, rollout, mean of heads"] for row in by_file] == [
        f"{share:.6g}" for share in shares.share[:, 0, 0]
    ]
    assert [bool(row["spot: ratio, rollout, mean of heads"]) for row in by_file] == [
        True,
        False,
        False,
        True,
    ]
    code, out, _ = call(capsys, monkeypatch, "rollout", batch, *options, "--out", "figures", "--overwrite", "--json")
    *photos, overview = json.loads(out)["results"]
    assert (len(photos), overview["group_by"]) == (4, "folder")
    rows = overview["region_means"]["rollout, mean of heads"]
    assert [(row["name"], row["region"], row["photos"]) for row in rows] == [
        ("cats", "border", 2), ("cats", "spot", 1), ("dogs", "border", 2), ("dogs", "spot", 1),
        ("all photos", "border", 4), ("all photos", "spot", 2),
    ]  # fmt: skip


@pytest.mark.slow
def test_groups_are_predicted_classes_by_default(capsys, monkeypatch, batch):
    scenes = {}
    monkeypatch.setattr("vitscope.cli.rollout.save", lambda _, path, *__: path.parent.mkdir(exist_ok=True))
    monkeypatch.setattr("vitscope.cli.regions.save", lambda scene, path, *_: scenes.setdefault(path.name, scene))
    code, _, _ = call(capsys, monkeypatch, "rollout", batch, "--region", "border", "--out", "figures")
    assert code == 0
    paths = [f"pics/{name}.png" for name in ("cats/a", "cats/b", "dogs/a", "dogs/b")]
    predicted = [predictions[0].label for predictions in vs.load("vit-nano").predict(paths)]
    scene = scenes["rollout-regions.png"]
    assert scene.title.startswith("Mean maps by predicted class: rollout, mean of heads")
    titles = [panel.title for panel in scene.rows[0].panels]
    for label in set(predicted):
        assert any(f"{label} ({predicted.count(label)} photo" in title for title in titles)
    for panel in scene.rows[0].panels:
        assert panel.outlines[0].mask.mean() == pytest.approx(0.36, abs=0.01)
        assert panel.lines[0].startswith("border: ")


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        (["0,0,900,20"], r"the box of region is 0,0,900,20 .* reaches outside"),
        (["a=missing.png"], "missing.png does not exist"),
        (["a=1,2,3"], "the region a is 1,2,3, 3 numbers: a box is x,y,width,height"),
        (["a=border", "a=1,2,3,4"], "two regions are called a: give each its own name, as in a2=1,2,3,4"),
        (["spot=empty"], "empty holds no mask of these photos: name each mask like its photo"),
        (["words"], "--region is 'words': pass numbers separated by commas"),
    ],
    ids=str,
)
def test_regions_that_cannot_be_measured_are_refused(capsys, monkeypatch, photo, regions, message):
    Path("empty").mkdir()
    options = [option for region in regions for option in ("--region", region)]
    code, _, err = call(capsys, monkeypatch, "rollout", photo, *options)
    assert code == 2
    assert re.search(message, err), err
    assert err.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == ["cat.png", "empty"]


def test_two_masks_of_one_photo_are_refused(capsys, monkeypatch, photo):
    Path("masks").mkdir()
    for suffix in ("png", "npy"):
        Path(f"masks/cat.{suffix}").touch()
    code, _, err = call(capsys, monkeypatch, "rollout", photo, "--region", "masks")
    assert code == 2
    assert "masks/cat.npy and masks/cat.png are both masks of cat.png: remove one of them" in err


def test_shifted_windows_have_no_regions(capsys, monkeypatch, photo):
    options = ("-m", "swin-nano", "-l", "2", "--query", "1,1", "--shifted", "--region", "border")
    code, _, err = call(capsys, monkeypatch, "attention", photo, *options)
    assert (code, "leave out --shifted" in err) == (2, True)


def test_marks_are_boxes_polygons_and_masks():
    assert parse_name("dog=1,2,3,4", "object") == ("dog", "1,2,3,4")
    assert parse_name("1,2,3,4", "object") == ("object", "1,2,3,4")
    assert parse_mark("1,2,3.5,4", "--region") == {"box": [1, 2, 3.5, 4]}
    assert parse_mark("1,2,3,4,5,6", "--region") == {"polygon": [(1, 2), (3, 4), (5, 6)]}
    assert parse_mark("masks/dog.png", "--region") == {"mask": "masks/dog.png"}
