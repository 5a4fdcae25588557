"""A researcher's walk: several photos of different sizes, several methods, saved and loaded again."""

import csv
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

import vitscope as vs
from tests.helpers.command_line import call, needs_bundled

pytestmark = [pytest.mark.slow, needs_bundled]


@pytest.fixture(name="photos")
def class_folders(tmp_path, monkeypatch):
    """Return a folder of class folders: equal names, different sizes, and a file that is no image."""
    monkeypatch.chdir(tmp_path)
    for name, image in (
        ("cats/a.png", skimage.data.chelsea()),
        ("cats/b.png", skimage.data.chelsea()[:, 100:300]),
        ("cups/a.png", skimage.data.coffee()[::2, ::2]),
    ):
        path = Path("photos", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    Path("photos/cups/broken.jpg").write_text("no image")
    return "photos"


@pytest.fixture(scope="module")
def explanation():
    """Return maps of two photos by four methods with one baseline."""
    images = [skimage.data.chelsea(), skimage.data.coffee()[::2, ::2]]
    methods = ["libra", "occlusion", "rise", "lime"]
    return vs.explain(vs.load("vit-nano"), images, methods, hide="black", num_samples=120)


def test_a_bad_photo_ends_no_batch_and_a_second_run_skips(photos, capsys, monkeypatch):
    arguments = ("rollout", photos, "--out", "figures", "--skip-existing", "--dpi", "60")
    code, _, err = call(capsys, monkeypatch, *arguments)
    assert code == 1
    assert "photos/cups/broken.jpg is not an image" in err.splitlines()[-1]
    assert "Traceback" not in err
    names = [f"{name}-rollout.png" for name in ("cats_a", "cats_b", "cups_a")]
    assert sorted(path.name for path in Path("figures").iterdir()) == [*names, "summary.csv"]
    times = [(Path("figures") / name).stat().st_mtime_ns for name in names]
    assert sum((Path("figures") / name).stat().st_size for name in names) < 1_500_000
    Path("photos/cups/broken.jpg").unlink()
    code, out, _ = call(capsys, monkeypatch, *arguments)
    assert (code, "cats_a" in out) == (0, False)
    assert times == [(Path("figures") / name).stat().st_mtime_ns for name in names]
    with Path("figures/summary.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == names
    assert len({row["photo"] for row in rows}) == 3
    assert {row["model"] for row in rows} == {"vit-nano"}


def test_maps_of_a_comparison_share_one_baseline_that_the_figure_names(explanation):
    for result in explanation.photos:
        hides = {name: map_.provenance["parameters"].get("hide") for name, map_ in result.results.items()}
        assert hides == {"libra": None, "occlusion": "black", "rise": "black", "lime": "black"}
        assert result.agreement.names == list(hides)
    texts = [text.get_text() for text in explanation[0].figure().findobj(lambda artist: hasattr(artist, "get_text"))]
    assert any("black" in text for text in texts)


def test_every_class_that_was_evaluated_can_be_explained_afterwards(explanation):
    for name in ("occlusion", "rise", "lime"):
        result = explanation[0].results[name]
        assert result.target == "cat"
        dog = result.of("dog")
        assert dog.target == "dog"
        assert not np.array_equal(np.asarray(dog), np.asarray(result))
    contrast = explanation[0].results["lime"].of(("cat", "dog"))
    assert contrast.target == "cat − dog"


def test_saved_results_know_their_photos_and_can_be_drawn_and_compared(photos, tmp_path):
    paths = [Path(photos, name) for name in ("cats/a.png", "cups/a.png")]
    model = vs.load("vit-nano")
    occlusion = vs.occlusion(model, paths)
    rollout = vs.rollout(model, paths)
    loaded = vs.SampledAttribution.load(occlusion.save(tmp_path / "occlusion.safetensors"))
    records = loaded.photo_records()
    assert [record["name"] for record in records] == ["a.png", "a.png"]
    assert [record["size"] for record in records] == [[451, 300], [300, 200]]
    assert loaded.provenance["weights_sha256"] == rollout.provenance["weights_sha256"]
    assert loaded.provenance["preprocessing"]["size"] == [32, 32]
    assert np.array_equal(np.asarray(loaded), np.asarray(occlusion))
    drawn = loaded.with_photos(paths)
    assert drawn[1].overlay().size == (300, 200)
    assert drawn.save(tmp_path / "a.png", index=1).stat().st_size < 200_000
    assert vs.agreement([drawn[0], rollout[0]]).rank_correlation.shape == (2, 2)
    with pytest.raises(vs.CallError):
        loaded.with_photos(paths[:1])


def test_results_become_figures_in_own_axes_and_arrays(explanation):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(4, 3))
    try:
        explanation[0].results["libra"].figure(axes)
        assert len(axes.images) + sum(len(inset.images) for inset in axes.child_axes) >= 1
    finally:
        plt.close(figure)
    assert np.asarray(explanation[0].results["libra"]).shape == (1, 8, 8)
    assert max(len(repr(map_)) for map_ in explanation[0].results.values()) < 200
