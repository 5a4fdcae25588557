"""A comparison from end to end on real photographs: cuts of scikit-image's brick, grass and gravel."""

from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

import vitscope as vs
from tests.cli.test_app import needs_bundled
from tests.helpers.comparisons import quick
from vitscope.tune.comparison import Comparison
from vitscope.views import comparison_page as page

pytestmark = needs_bundled
SIDE, CUTS = 64, {"train": range(0, 4), "test": range(5, 8)}  # pixels a side; columns of the photograph
MODELS, TUNING_METHODS = ("vit-nano", "swin-nano"), ("head", "adapter-mlp", "lora")


@pytest.fixture(scope="module")
def textures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The left of each photograph to train on, the right to test on, with a gap between them."""
    folder = tmp_path_factory.mktemp("real") / "textures"
    for label in ("brick", "grass", "gravel"):
        photo = getattr(skimage.data, label)()
        for split, columns in CUTS.items():
            (folder / split / label).mkdir(parents=True)
            for x in columns:
                for y in range(0, 8, 2):
                    cut = photo[y * SIDE : (y + 1) * SIDE, x * SIDE : (x + 1) * SIDE]
                    Image.fromarray(cut).save(folder / split / label / f"{x}-{y}.png")
    return folder


@pytest.fixture(scope="module")
def compared(textures: Path) -> Comparison:
    with quick():
        return vs.compare(
            textures, MODELS, out=textures.parent / "out", tunings=TUNING_METHODS, seeds=1, epochs=4, batch_size=8
        )


def test_nothing_of_the_test_set_is_in_train(compared: Comparison) -> None:
    assert compared.inspection is not None
    assert set(compared.inspection.data.counts().values()) == {(16, 12)}
    assert (compared.inspection.exact, compared.inspection.near, compared.inspection.unreadable) == ((), (), ())


def test_every_tuning_learns_what_a_guess_does_not_know(compared: Comparison) -> None:
    rows = compared.summaries()
    assert [(row.model, row.tuning) for row in rows] == [
        (model, tuning) for model in MODELS for tuning in TUNING_METHODS
    ]
    for row in rows:
        assert row.accuracy > 0.6
        assert row.interval[0] <= row.accuracy <= row.interval[1]
        assert row.confusion.sum() == 36


def test_the_head_alone_leaves_the_attention_and_the_others_do_not(compared: Comparison) -> None:
    for row in compared.summaries():
        assert row.distances is not None
        assert (max(row.distances) == 0) == (row.tuning == "head")
        for faithful in (row.faithfulness_before, row.faithfulness_after):
            assert faithful is not None
            assert all(0 <= share <= 1 for share in faithful.values())


def test_swins_gain_less_vits_is_the_interaction(compared: Comparison) -> None:
    share = {(row.model, row.tuning): row.accuracy for row in compared.summaries()}
    found = compared.interactions()
    assert [(one.tuning, one.first, one.second) for one in found] == [
        (tuning, "swin-nano", "vit-nano") for tuning in TUNING_METHODS[1:]
    ]
    for one in found:
        gains = [share[model, one.tuning] - share[model, "head"] for model in (one.first, one.second)]
        assert one.value == pytest.approx(gains[0] - gains[1])
        assert one.interval[0] <= one.value <= one.interval[1]


@pytest.mark.usefixtures("coarse_figures")
def test_the_page_shows_it(compared: Comparison) -> None:
    written = page.write_page(compared, compared.folder)
    assert all(path.stat().st_size > 1000 for path in written)
    text = (compared.folder / "report.html").read_text(encoding="utf-8")
    assert all(f"{row.accuracy:.1%}" in text for row in compared.summaries())


def test_a_model_tuned_on_them_explains_itself(textures: Path, tmp_path: Path) -> None:
    tuned = vs.finetune("swin-nano", textures, out=tmp_path / "run", tuning="lora", epochs=3, batch_size=8)
    assert tuned.accuracy > 0.6
    shown = vs.rollout(vs.load(tmp_path / "run"), skimage.data.grass()[:SIDE, -SIDE:])
    values = np.asarray(shown.values)
    assert np.isfinite(values).all()
    assert values.std() > 0
