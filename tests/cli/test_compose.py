"""The command compose: files, tables and JSON, objects on the command line and in recipes, and mistakes."""

import csv
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vitscope as vs
from tests.cli.test_app import needs_bundled, photo_in_an_empty_folder, run
from tests.helpers.command_line import printed_results
from tests.reference.stage import boxed

pytestmark = needs_bundled
photo = photo_in_an_empty_folder
BOX = ("--object", "cat=105,20,120,100")
QUICK = (*BOX, "--test", "split", "--no-attention")
SMALL = ("--places", "3", "--scales", "0.5,1", "--no-attention")


@pytest.fixture(scope="session", name="bare")
def a_model_without_classes(tmp_path_factory) -> Path:
    import torch
    import transformers

    from tests.helpers.families import TINY

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "bare"
    config = transformers.Dinov2Config(**(TINY | {"image_size": 32, "patch_size": 8}))
    transformers.Dinov2Model(config).eval().save_pretrained(path)
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    processor.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def coarse(monkeypatch) -> None:
    """Draw figures with fewer pixels, to save time."""
    from vitscope.views import figure

    monkeypatch.setattr(figure, "DPI", 50)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_the_default_tests_write_tables_and_figures(photo, tmp_path, capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, "compose", photo, *BOX, "--places", "3")
    assert (code, err) == (0, "")
    names = ["places-and-sizes.png", "plate.png", "result.json", "table.csv"]
    assert files(tmp_path / "cat-compose") == names
    assert all(f"wrote cat-compose/{name}" in out for name in names)
    assert "cat.png, as vit-nano sees it:" in out
    assert "cat, by place of cat:" in out
    with Image.open("cat-compose/plate.png") as figure:
        assert figure.width > 500
    expected = vs.compose(vs.load("vit-nano"), photo, {"cat": (105, 20, 120, 100)}, places=3)
    content = json.loads(Path("cat-compose/result.json").read_text(encoding="utf-8"))
    np.testing.assert_allclose([entry["outputs"] for entry in content["edited_images"]], expected.outputs, atol=1e-6)
    with Path("cat-compose/table.csv").open(newline="", encoding="utf-8") as table:
        assert [row["edited image"] for row in csv.DictReader(table)] == expected.names
    first = next(line for line in out.splitlines() if "original" in line)
    ranked = expected.ranking(0).classes
    assert first.split()[1:] == [word for entry in ranked for word in (entry.label, f"{100 * entry.value:.1f}")]
    line = next(line for line in out.splitlines() if "cat left out" in line)
    assert any(sign in line for sign in ("▲+", "▼−", "="))


@pytest.mark.slow
def test_full_shows_all_images(photo, capsys, monkeypatch):
    objects = ("--object", "a=120,60,80,120", "--object", "b=220,60,90,120", "--object", "c=120,190,180,60")
    heights, lengths = [], []
    for out, options in (("part", ()), ("all", ("--full",))):
        code, text, err = run(
            capsys, monkeypatch, "compose", photo, *objects, "--no-attention", *options, "--out", out, "--places", "3"
        )
        assert (code, err) == (0, "")
        lines = text.splitlines()
        lengths.append(len([line for line in lines if not line.startswith("wrote")]))
        assert any(line.endswith(": --full shows all") for line in lines) is (out == "part")
        with Image.open(f"{out}/plate.png") as image:
            heights.append(image.height / image.width)
    assert lengths[0] <= 25 < 45 < lengths[1]
    assert heights[0] < 1.4 * 0.6 < heights[1]


@pytest.mark.slow
def test_json_holds_the_same_as_python(photo, capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, "compose", photo, *BOX, *SMALL, "--json", "--output", "logit")
    assert (code, err) == (0, "")
    (entry,) = printed_results(out)
    options = {"places": 3, "scales": [0.5, 1], "output": "logit"}
    expected = vs.compose(vs.load("vit-nano"), photo, {"cat": (105, 20, 120, 100)}, **options)
    (result,) = entry["results"]
    assert [image["name"] for image in result["edited_images"]] == expected.names
    np.testing.assert_allclose([image["outputs"] for image in result["edited_images"]], expected.outputs, atol=1e-5)
    assert entry["image"] == "cat.png"
    assert all(Path(name).exists() for name in entry["files"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tests", "names"),
    [
        (("size",), ["places-and-sizes.png", "plate.png", "result.json", "table.csv"]),
        (("location",), ["places-and-sizes.png", "plate.png", "result.json", "table.csv"]),
        (("split",), ["plate.png", "result.json", "table.csv"]),
        (("none",), ["plate.png", "result.json", "table.csv"]),
        (("controls",), ["controls.png", "plate.png", "result.json", "table.csv"]),
    ],
    ids=lambda argument: argument[0],
)
def test_each_test_writes_its_files(photo, tmp_path, capsys, monkeypatch, tests, names):
    chosen = [argument for name in tests for argument in ("--test", name)]
    code, out, err = run(capsys, monkeypatch, "compose", photo, *BOX, *SMALL, *chosen, "--out", "made")
    assert (code, err) == (0, "")
    assert files(tmp_path / "made") == names
    assert out.count("wrote made/") == len(names)


@pytest.mark.slow
def test_effects_are_printed_and_drawn(photo, capsys, monkeypatch):
    arguments = ("compose", photo, *BOX, "--test", "controls", *SMALL)
    code, out, _ = run(capsys, monkeypatch, *arguments)
    assert code == 0
    assert "effects on vit-nano, 1 image, in percentage points:" in out
    options = {"tests": "controls", "places": 3}
    expected = vs.effects(vs.compose(vs.load("vit-nano"), photo, {"cat": (105, 20, 120, 100)}, **options))
    for effect in expected:
        assert any(line.split()[-1] == f"{100 * effect.mean:+.2f}" for line in out.splitlines() if effect.name in line)
    assert re.search(r"^ +positions\b[^\n]*\n? +neutral\b", out, re.MULTILINE)  # in one line or broken over two
    code, out, _ = run(capsys, monkeypatch, *arguments, "--json")
    entry = printed_results(out)[-1]
    assert entry["model"] == "vit-nano"
    assert entry["files"] == ["cat-compose-2/controls.png"]
    assert [effect["name"] for effect in entry["effects"]] == [effect.name for effect in expected]
    assert [effect["mean"] for effect in entry["effects"]] == pytest.approx(
        [effect.mean for effect in expected], abs=1e-5
    )


@pytest.mark.slow
def test_several_classes_may_be_passed(photo, capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, "compose", photo, *BOX, *SMALL, "--target", "dog", "-t", "cat", "--json")
    assert (code, err) == (0, "")
    assert printed_results(out)[0]["results"][0]["objects"][0]["class"] == "dog"
    dog_figure = Path("cat-compose/places-and-sizes.png").read_bytes()
    run(capsys, monkeypatch, "compose", photo, *BOX, *SMALL, "--target", "dog")
    assert Path("cat-compose-2/places-and-sizes.png").read_bytes() != dog_figure
    assert run(capsys, monkeypatch, "compose", photo, *BOX, *SMALL, "-t", "cat", "-t", "tabby")[0] == 2


@pytest.mark.slow
def test_a_cropped_object_is_a_line(photo, capsys, monkeypatch):
    monkeypatch.setattr(vs.Composition, "visible_fraction", lambda *_: 0.42)
    code, _, err = run(capsys, monkeypatch, "compose", photo, *QUICK)
    assert code == 0
    assert err == "vitscope: vit-nano crops the photo and sees only 42% of cat\n"


@pytest.mark.slow
def test_a_wide_terminal_describes_the_effects(photo, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = run(capsys, monkeypatch, "compose", photo, *BOX, "--test", "controls", *SMALL)
    assert "with the object, minus without it" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("105,20,120,100", "object"),
        ("cat=105,20,120,100", "cat"),
        ("cat=105, 20, 120, 100", "cat"),
        ("cat=105,20,225,20,225,120,105,120", "cat"),
        ("105.2,20.4,120,100", "object"),
        ("105.2, 20.4, 120, 100", "object"),
        ("mask.png", "object"),
        ("the cat=mask.npy", "the cat"),
    ],
)
def test_an_object_may_be_named_and_marked_in_many_ways(photo, capsys, monkeypatch, text, name):
    mask = boxed(300, 451, (105, 20, 120, 100))
    Image.fromarray(mask).save("mask.png")
    np.save("mask.npy", mask)
    code, out, err = run(capsys, monkeypatch, "compose", photo, "-b", text, "--test", "none", "--json")
    assert (code, err) == (0, "")
    (entry,) = printed_results(out)[0]["results"][0]["objects"]
    assert (entry["name"], entry["box"]) == (name, [105, 20, 120, 100])


@pytest.mark.slow
def test_segments_are_picked_by_number(photo, capsys, monkeypatch):
    chosen = ("--object", "face=segments:3,4", "--segments", "slic", "--test", "none", "--json")
    code, out, _ = run(capsys, monkeypatch, "compose", photo, *chosen)
    assert code == 0
    expected = vs.object_mask(photo, segments=[3, 4], cut="slic")
    assert printed_results(out)[0]["results"][0]["objects"][0]["box"] == list(expected.box)


@pytest.mark.slow
def test_a_rough_box_is_refined(photo, capsys, monkeypatch):
    pytest.importorskip("cv2")
    code, out, _ = run(capsys, monkeypatch, "compose", photo, *BOX, "--refine", "--test", "none", "--json")
    assert code == 0
    expected = vs.object_mask(photo, box=(105, 20, 120, 100), refine=True)
    entry = printed_results(out)[0]["results"][0]["objects"][0]
    assert entry["box"] == list(expected.box)
    assert entry["area"] == pytest.approx(expected.area, rel=1e-8)  # nine digits are printed
    assert entry["area"] != 120 * 100 / 300 / 451


@pytest.mark.slow
def test_several_objects_may_be_marked(photo, capsys, monkeypatch):
    code, out, _ = run(
        capsys, monkeypatch, "compose", photo, "-b", "5,5,50,60", "-b", "100,90,80,80", *QUICK[2:], "--json"
    )
    assert code == 0
    names = [image["name"] for image in printed_results(out)[0]["results"][0]["edited_images"]]
    assert "object 1 and object 2 exchanged" in names


RECIPE = """
[[image]]
photo = "cat.png"
[[image.object]]
name = "face"
class = "cat"
box = [105, 20, 120, 100]
[[image.edited_image]]
name = "small"
show = [{ name = "face", scale = 0.5 }]
"""


@pytest.mark.slow
@pytest.mark.usefixtures("photo")
def test_a_recipe_replaces_the_options(tmp_path, capsys, monkeypatch):
    Path("recipe.toml").write_text(RECIPE)
    code, out, err = run(capsys, monkeypatch, "compose", "--annotations", "recipe.toml", "--test", "none", "--json")
    assert (code, err) == (0, "")
    (entry,) = printed_results(out)
    assert [image["name"] for image in entry["results"][0]["edited_images"]] == ["original", "small"]
    assert entry["results"][0]["objects"][0]["class"] == "cat"
    assert files(tmp_path / "cat-compose") == ["plate.png", "result.json", "table.csv"]


@pytest.mark.slow
def test_each_photo_of_a_recipe_has_its_folder(photo, tmp_path, capsys, monkeypatch):
    Image.open(photo).rotate(5).save("dog.png")
    Path("recipe.toml").write_text(RECIPE + RECIPE.replace("cat.png", "dog.png"))
    chosen = ("--annotations", "recipe.toml", "--test", "controls", *SMALL, "--out", "made")
    code, out, err = run(capsys, monkeypatch, "compose", photo, "dog.png", *chosen)
    assert (code, err) == (0, "")
    names = ["plate.png", "result.json", "table.csv"]
    assert files(tmp_path / "made") == sorted(
        ["controls.png", *(f"{stem}/{name}" for stem in ("cat", "dog") for name in names)]
    )
    assert "2 images, in percentage points" in out
    assert " to " in next(line for line in out.splitlines() if "context: blank" in line)


@pytest.mark.slow
def test_models_are_compared(photo, tmp_path, capsys, monkeypatch):
    chosen = (*BOX, *SMALL, "--test", "size", "--test", "location", "--test", "controls", "--compare", "swin-nano")
    code, out, err = run(capsys, monkeypatch, "compose", photo, *chosen)
    assert (code, err) == (0, "")
    kinds = ("controls.png", "plate.png", "result.json", "table.csv")
    assert files(tmp_path / "cat-compose") == sorted(
        ["places-and-sizes.png", *(f"{model}-{kind}" for model in ("vit-nano", "swin-nano") for kind in kinds)]
    )
    for model in ("vit-nano", "swin-nano"):
        assert f"as {model} sees it" in out
        assert f"effects on {model}" in out


@pytest.mark.slow
def test_classes_come_from_examples(photo, bare, capsys, monkeypatch):
    for name, box in (("face", (105, 20, 225, 120)), ("wall", (300, 10, 440, 150))):
        Path("examples", name).mkdir(parents=True)
        Image.open(photo).crop(box).save(Path("examples", name, "1.png"))
    chosen = ("--model", str(bare), *QUICK)
    code, out, _ = run(capsys, monkeypatch, "compose", photo, *chosen, "--examples", "examples", "--json")
    assert code == 0
    assert printed_results(out)[0]["results"][0]["labels"] == ["face", "wall"]
    code, out, _ = run(capsys, monkeypatch, "compose", photo, *chosen)
    assert code == 0
    assert "image" in out
    assert "similarity" in out
    assert "1.00" in out
    code, _, err = run(capsys, monkeypatch, "compose", photo, *QUICK, "--examples", "examples")
    assert (code, err.count("\n")) == (2, 1)
    assert "has classes already" in err


def test_background_fill_feather_seed_and_input_size_are_passed_on(photo, bare, capsys, monkeypatch):
    Image.new("RGB", (50, 50), (200, 30, 30)).save("red.png")
    chosen = ("--background", "red.png", "--fill", "10,20,30", "--feather", "2", "--seed", "4", "--image-size", "48")
    arguments = ("compose", photo, "-m", str(bare), *BOX, "--test", "none", *chosen, "--json")
    code, out, _ = run(capsys, monkeypatch, *arguments)
    assert code == 0
    parameters = printed_results(out)[0]["results"][0]["provenance"]["parameters"]
    assert (parameters["background"], parameters["fill"]) == ("an image", [10.0, 20.0, 30.0])
    assert (parameters["feather"], parameters["seed"]) == (2.0, 4)


@pytest.mark.slow
def test_files_are_replaced_only_with_overwrite(photo, tmp_path, capsys, monkeypatch):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "plate.png").write_text("mine")
    code, out, err = run(capsys, monkeypatch, "compose", photo, *QUICK, "--out", "made")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "plate.png exists already: pass --overwrite or another --out" in err
    assert files(tmp_path / "made") == ["plate.png"]
    assert (tmp_path / "made" / "plate.png").read_text() == "mine"
    code, _, _ = run(capsys, monkeypatch, "compose", photo, *QUICK, "--out", "made", "--overwrite")
    assert code == 0
    assert files(tmp_path / "made") == ["plate.png", "result.json", "table.csv"]
    for name in ("cat-compose", "cat-compose-2"):
        code, out, _ = run(capsys, monkeypatch, "compose", photo, *QUICK)
        assert f"wrote {name}/plate.png" in out


MISTAKES = [
    (["cat.png"], "mark an object in it, as --object 105,20,235,200"),
    (["--object", "1,2,30,40"], "compose got 0 photos and 1 objects"),
    (["cat.png", "cat.png", *BOX], "compose got 2 photos and 1 objects"),
    (["nowhere.png", *BOX], "nowhere.png does not exist"),
    (["cat.png", "--object", "1,2,3"], "has 3 numbers: pass left, top, width, height"),
    (["cat.png", "--object", "cat"], "pass numbers separated by commas"),
    (["cat.png", "--object", "dog=400,2,90,90"], "reaches outside the image of 451×300"),
    (["cat.png", "--object", "dog=10.5,-5,20,20"], "reaches outside the image of 451×300"),
    (["cat.png", "--object", "0,0,451,300"], "is the whole image"),
    (["cat.png", "--object", "5,5,0,9"], "which is empty"),
    (["cat.png", "--object", "mask.png"], "mask.png does not exist"),
    (["cat.png", "--object", "segments:a"], "'a': pass numbers"),
    (["cat.png", "--object", "segments:9999"], "segment 9999 of object does not exist"),
    (["cat.png", "--object", "5,5,50,50", "--object", "20,20,50,50"], "object 1 and object 2 overlap in 1,225 pixels"),
    (
        ["cat.png", "--object", "a=5,5,50,50", "--object", "a=90,90,50,50"],
        "two objects have the same name (a, a): give each its own name",
    ),
    (["cat.png", *BOX, "--test", "sizes"], "unknown test 'sizes': choose size, location, split, controls"),
    (["cat.png", *BOX, "--scales", "0.5,big"], "--scales is '0.5,big': pass numbers"),
    (["cat.png", *BOX, "--scales", "0"], "pass numbers above 0"),
    (["cat.png", *BOX, "--scales", "9"], "does not fit"),
    (["cat.png", *BOX, "--places", "1"], "places is 1, at least 2"),
    (["cat.png", *BOX, "--places", "3,3,3"], "pass rows and columns"),
    (["cat.png", *BOX, "--location-scale", "8"], "pass a location_scale well below"),
    (["cat.png", *BOX, "--target", "tabby"], "the nearest labels are"),
    (["cat.png", *BOX, "--fill", "inpant"], "inpant"),
    (["cat.png", *BOX, "--feather", "200"], "pass 0 to 75 pixels"),
    (["cat.png", *BOX, "--test", "controls", "--background", "nowhere.png"], "nowhere.png does not exist"),
    (["cat.png", *BOX, "--output", "odds"], "odds"),
    (["cat.png", *BOX, "--top-k", "0"], "top-k"),
    (["cat.png", *BOX, "--compare", "vit-nano"], "two models have the same name"),
    (["cat.png", *BOX, "--compare", "vit-nanoo"], "did you mean"),
    (["cat.png", *BOX, "--out", "figure.png"], "compose writes several files: pass a folder"),
    (["cat.png", *BOX, "--out", "cat.png"], "pass a folder"),
    (["cat.png", *BOX, "--annotations", "recipe.toml"], "cannot combine --annotations with --object"),
    (["cat.png", "--annotations", "recipe.toml", "--refine"], "cannot combine --annotations with --object, --refine"),
    (["cat.png", "--annotations", "recipe.toml", "--segments", "slic"], "or --segments: mark the objects in the file"),
    (["cat.png", *BOX, "--background", "nowhere.png"], "nowhere.png does not exist"),
    (["--annotations", "nowhere.toml"], "nowhere.toml does not exist"),
    (["--annotations", "cat.png"], "is no file of annotations"),
    (["cat.png", *BOX, "--examples", "nowhere"], "has classes already"),
    (["cat.png", *BOX, "--batch-size", "0"], "at least 1"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[f"{i}" for i in range(len(MISTAKES))])
@pytest.mark.usefixtures("photo", "unchecked")
def test_a_mistake_is_one_clear_line_and_writes_nothing(tmp_path, capsys, monkeypatch, arguments, words):
    code, out, err = run(capsys, monkeypatch, "compose", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("vitscope: ")
    assert err.count("\n") == 1
    assert words in err
    assert files(tmp_path) == ["cat.png"]


@pytest.mark.usefixtures("photo")
def test_an_unknown_class_is_refused_before_any_file_is_written(tmp_path, capsys, monkeypatch):
    Path("recipe.toml").write_text(RECIPE.replace('"cat"\nbox', '"tabby"\nbox'))
    code, out, err = run(capsys, monkeypatch, "compose", "--annotations", "recipe.toml")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "tabby" in err
    assert files(tmp_path) == ["cat.png", "recipe.toml"]


@pytest.mark.usefixtures("photo")
def test_photos_of_the_same_name_are_refused(capsys, monkeypatch):
    Path("recipe.toml").write_text(RECIPE * 2)
    code, out, err = run(capsys, monkeypatch, "compose", "--annotations", "recipe.toml")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "the same name" in err


def test_failures_have_exit_code_one(photo, tmp_path, capsys, monkeypatch):
    (tmp_path / "made").write_text("a file")
    monkeypatch.setitem(sys.modules, "cv2", None)
    code, out, err = run(capsys, monkeypatch, "compose", photo, *QUICK, "--refine")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "pip install 'vitscope[opencv]'" in err
    Path("broken.png").write_bytes(b"no image")
    code, out, err = run(capsys, monkeypatch, "compose", "broken.png", *QUICK)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "broken.png is not an image" in err


@pytest.mark.slow
def test_ctrl_c_keeps_the_outputs_so_far(photo, tmp_path, capsys, monkeypatch):
    from vitscope.models import VisionModel

    answer, batches = VisionModel.logits, []

    def interrupted(self, pixels):
        batches.append(len(pixels))
        if len(batches) == 4:  # the photo alone, then two batches
            raise KeyboardInterrupt
        return answer(self, pixels)

    monkeypatch.setattr(VisionModel, "logits", interrupted)
    chosen = ("--batch-size", "5", "--test", "location", "--no-attention", "--places", "5")
    code, out, err = run(capsys, monkeypatch, "compose", photo, *BOX, *chosen)
    assert code == 1
    assert "10 of 26 samples" in err
    assert "interrupted; finished results are kept" in err
    assert files(tmp_path / "cat-compose") == ["plate.png", "result.json", "table.csv"]
    assert "wrote cat-compose/table.csv" in out
    rows = Path("cat-compose/table.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 11


@pytest.mark.slow
def test_ctrl_c_in_the_second_model_keeps_the_first(photo, tmp_path, capsys, monkeypatch):
    from vitscope.compositing.predict import EditedImagePredictor

    predict, models = EditedImagePredictor.predict, []

    def interrupted(self, *arguments):
        models.append(self.model.name)
        if len(models) == 2:
            raise KeyboardInterrupt
        return predict(self, *arguments)

    monkeypatch.setattr(EditedImagePredictor, "predict", interrupted)
    code, _, err = run(capsys, monkeypatch, "compose", photo, *QUICK, "--compare", "swin-nano")
    assert (code, err.count("\n")) == (1, 1)
    assert models == ["vit-nano", "swin-nano"]
    assert [name for name in files(tmp_path) if name.endswith("vit-nano-result.json")], "the first model was finished"
