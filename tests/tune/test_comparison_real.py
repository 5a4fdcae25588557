"""A comparison from end to end on real photographs: crops of scikit-image's brick, grass and gravel."""

from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

import vitscope as vs
from tests.cli.test_app import needs_bundled
from tests.helpers.comparisons import quick
from vitscope.tune.comparison_result import Comparison
from vitscope.views import comparison_page as page

pytestmark = needs_bundled
SIDE, CROPS = 64, {"train": range(0, 4), "test": range(5, 8)}  # pixels per side; columns of the photograph
MODELS, TUNING_METHODS = ("vit-nano", "swin-nano"), ("head", "adapter-mlp", "lora")


@pytest.fixture(scope="module")
def textures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write crops of the left of each photograph to train on and of the right to test on, with a gap between them."""
    folder = tmp_path_factory.mktemp("real") / "textures"
    for label in ("brick", "grass", "gravel"):
        photo = getattr(skimage.data, label)()
        for split, columns in CROPS.items():
            (folder / split / label).mkdir(parents=True)
            for x in columns:
                for y in range(0, 8, 2):
                    crop = photo[y * SIDE : (y + 1) * SIDE, x * SIDE : (x + 1) * SIDE]
                    Image.fromarray(crop).save(folder / split / label / f"{x}-{y}.png")
    return folder


@pytest.fixture(scope="module")
def compared(textures: Path) -> Comparison:
    with quick():
        return vs.compare(
            textures, MODELS, out=textures.parent / "out", tunings=TUNING_METHODS, seeds=1, epochs=4, batch_size=8
        )


@pytest.mark.slow
def test_nothing_of_the_test_set_is_in_train(compared: Comparison) -> None:
    assert compared.data_check is not None
    assert set(compared.data_check.data.counts().values()) == {(16, 12)}
    assert (compared.data_check.exact, compared.data_check.near, compared.data_check.unreadable) == ((), (), ())


def test_every_tuning_method_is_better_than_chance(compared: Comparison) -> None:
    rows = compared.summaries()
    assert [(row.model, row.tuning) for row in rows] == [
        (model, tuning) for model in MODELS for tuning in TUNING_METHODS
    ]
    for row in rows:
        assert row.accuracy > 0.6
        assert row.interval[0] <= row.accuracy <= row.interval[1]
        assert row.confusion.sum() == 36


def test_only_the_head_method_does_not_change_the_attention(compared: Comparison) -> None:
    for row in compared.summaries():
        assert row.distances is not None
        assert (max(row.distances) == 0) == (row.tuning == "head")
        for areas in (row.faithfulness_before, row.faithfulness_after):
            assert areas is not None
            assert all(0 <= share <= 1 for share in areas.values())


def test_the_interaction_is_the_gain_of_swin_minus_the_gain_of_vit(compared: Comparison) -> None:
    share = {(row.model, row.tuning): row.accuracy for row in compared.summaries()}
    interactions = compared.interactions()
    assert [(entry.tuning, entry.first, entry.second) for entry in interactions] == [
        (tuning, "swin-nano", "vit-nano") for tuning in TUNING_METHODS[1:]
    ]
    for entry in interactions:
        gains = [share[model, entry.tuning] - share[model, "head"] for model in (entry.first, entry.second)]
        assert entry.value == pytest.approx(gains[0] - gains[1])
        assert entry.interval[0] <= entry.value <= entry.interval[1]


@pytest.mark.slow
@pytest.mark.usefixtures("coarse_figures")
def test_the_report_shows_every_accuracy(compared: Comparison) -> None:
    paths = page.write_page(compared, compared.folder)
    assert all(path.stat().st_size > 1000 for path in paths)
    text = (compared.folder / "report.html").read_text(encoding="utf-8")
    assert all(f"{row.accuracy:.1%}" in text for row in compared.summaries())


@pytest.mark.slow
def test_the_rollout_of_a_tuned_model_is_finite_and_not_flat(textures: Path, tmp_path: Path) -> None:
    tuned = vs.finetune("swin-nano", textures, out=tmp_path / "run", tuning="lora", epochs=3, batch_size=8)
    assert tuned.accuracy > 0.6
    result = vs.rollout(vs.load(tmp_path / "run"), skimage.data.grass()[:SIDE, -SIDE:])
    values = np.asarray(result.values)
    assert np.isfinite(values).all()
    assert values.std() > 0
