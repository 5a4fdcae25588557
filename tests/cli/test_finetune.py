"""The commands that train: what they print and write, the same call again, and one clear line for every mistake."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vitscope as vs
from tests.cli.test_app import needs_bundled, run
from tests.helpers.coloured import coloured_folder
from vitscope.tune import comparison as comparing
from vitscope.tune import finetune as finetuning
from vitscope.views import comparison_page as page

pytestmark = [needs_bundled, pytest.mark.usefixtures("quick_comparisons", "coarse_figures")]
QUICK = ("--epochs", "1", "--batch-size", "4")
SMALL = (*QUICK, "--models", "vit-nano", "--tunings", "head", "--seeds", "1")


@pytest.fixture(autouse=True, name="here")
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, with a terminal that is wide enough for every column."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(name="birds")
def folder_of_images(tmp_path: Path) -> Path:
    """Ten images of two classes, of which two are for testing."""
    return coloured_folder(tmp_path / "birds", {"red": 5, "blue": 5})


@pytest.fixture(name="leaky")
def with_a_split_and_a_leak(tmp_path: Path) -> Path:
    coloured_folder(tmp_path / "leaky/train", {"red": 4, "blue": 4})
    coloured_folder(tmp_path / "leaky/test", {"red": 2, "blue": 2}, seed=1)
    (tmp_path / "leaky/train/red/0.png").write_bytes((tmp_path / "leaky/test/red/1.png").read_bytes())
    return tmp_path / "leaky"


def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was trained")

    monkeypatch.setattr(finetuning._Run, "trained", refuse)
    monkeypatch.setattr(comparing, "finetune", refuse)


def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all the rest."""
    monkeypatch.setattr(page, "_png", lambda _: b"a figure")


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def epochs(err: str) -> list[str]:
    """What is told of every epoch where no bar can be shown, without the accuracies."""
    told = [line.partition(", accuracy ") for line in err.splitlines()]
    assert all(0 <= float(accuracy.removesuffix("%")) <= 100 for _, _, accuracy in told)
    return [what for what, _, _ in told]


def kept(text: str) -> Any:
    """JSON without NaN or infinity."""
    return json.loads(text, parse_constant=pytest.fail)


# data


@pytest.mark.usefixtures("birds")
def test_data_counts_classes_and_draws_their_means(capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, "data", "birds")
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()[1:3]] == [["blue", "4", "1"], ["red", "4", "1"]]
    assert "no training image is in the test set; 0 training images are repeated" in out
    assert out.endswith("wrote birds-data.png\n")
    with Image.open("birds-data.png") as figure:
        assert figure.width > 100
    code, out, _ = run(capsys, monkeypatch, "data", "birds")
    assert (code, out.splitlines()[-1]) == (0, "wrote birds-data-2.png"), "the first figure must not be replaced"


@pytest.mark.usefixtures("leaky")
def test_data_as_json_is_what_python_gives(capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, "data", "leaky", "--json", "--out", "mine.png")
    assert (code, err) == (0, "")
    assert kept(out) == vs.inspect(vs.load_data("leaky")).as_json() | {"figure": "mine.png"}
    (twin,) = kept(out)["duplicates"]
    assert twin == {"train": "leaky/train/red/0.png", "test": "leaky/test/red/1.png", "exact": True}
    assert Path("mine.png").is_file()


@pytest.mark.usefixtures("birds")
def test_data_splits_as_it_is_told(capsys, monkeypatch):
    from vitscope.tune import data

    given, load = [], data.load_data
    monkeypatch.setattr(data, "load_data", lambda name, **options: given.append(options) or load(name, **options))
    options = ("--test-share", "0.4", "--per-class", "2", "--split-seed", "3", "--json")
    code, out, _ = run(capsys, monkeypatch, "data", "birds", *options)
    assert code == 0
    assert kept(out)["classes"] == {"blue": {"train": 2, "test": 2}, "red": {"train": 2, "test": 2}}
    assert given == [{"test_share": 0.4, "seed": 3, "per_class": 2}]


@pytest.mark.usefixtures("leaky")
def test_data_shows_what_cannot_be_read(capsys, monkeypatch):
    Path("leaky/train/blue/3.png").write_bytes(b"no image")
    code, out, _ = run(capsys, monkeypatch, "data", "leaky")
    assert code == 0
    assert "1 training image is in the test set too (1 exact pair and 0 near), 0 of them with different labels" in out
    assert "1 file counted above cannot be read as an image\nunreadable: leaky/train/blue/3.png is not a" in out


# finetune


@pytest.mark.usefixtures("birds")
def test_finetune_leaves_a_folder_that_explain_takes(tmp_path, capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, "finetune", "birds", *QUICK, "--tuning", "layernorm")
    folder = "birds-vit-nano-layernorm"
    assert (code, epochs(err)) == (0, ["vit-nano, layernorm: step 2 of 2"])
    assert out.endswith(f"wrote {folder}: explain it with --model {folder}\n")
    names = {"log.jsonl", "result.json", "run.json", "report.png", "model/vitscope.json", "model/model.safetensors"}
    assert names <= set(files(tmp_path / folder))
    about = json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))
    for words in (
        "vit-nano, layernorm, on birds",
        f"{about['accuracy']:.1%}",
        f"{about['macro_f1']:.3f}",
        f"{about['trained']:,}",
    ):
        assert words in out
    code, out, err = run(capsys, monkeypatch, "explain", "birds/red/0.png", "--model", folder, "--json")
    assert (code, err) == (0, "")
    (entry,) = json.loads(out)
    assert {one["label"] for one in entry["predictions"]} == {"red", "blue"}
    untrained(monkeypatch)
    before = Path(folder, "model/model.safetensors").read_bytes()
    code, out, _ = run(capsys, monkeypatch, "finetune", "birds", *QUICK, "--tuning", "layernorm")
    assert (code, out.splitlines()[-1]) == (0, f"{folder} was finished before: explain it with --model {folder}")
    assert Path(folder, "model/model.safetensors").read_bytes() == before
    # another run does not go into the same folder
    code, out, err = run(capsys, monkeypatch, "finetune", "birds", *QUICK, "--tuning", "head", "--out", folder)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "holds a run with another tuning" in err


@pytest.mark.usefixtures("birds")
def test_finetune_as_json_is_the_result_without_its_lists(capsys, monkeypatch):
    options = (*QUICK, "--out", "run", "--json", "--model", "swin-nano", "--learning-rate", "0.01", "--seed", "4")
    code, out, err = run(capsys, monkeypatch, "finetune", "birds", *options, "--recipe", "report")
    assert (code, err) == (0, "")
    about, whole = kept(out), json.loads(Path("run/result.json").read_text(encoding="utf-8"))
    assert about.pop("folder") == "run"
    assert about == {name: one for name, one in whole.items() if name not in ("said", "truth", "history")}
    assert (about["model"], about["tuning"], about["images"]) == ("swin-nano", "head", {"train": 8, "test": 2})
    recipe = about["recipe"]
    assert (recipe["epochs"], recipe["batch_size"], recipe["learning_rate"], recipe["seed"]) == (1, 4, 0.01, 4)
    assert (recipe["schedule"], recipe["augment"]) == ("constant", []), "the report's recipe"


@pytest.mark.usefixtures("leaky")
def test_duplicates_are_told_of_or_dropped(capsys, monkeypatch):
    call = ("finetune", "leaky", *QUICK, "--json")
    code, out, err = run(capsys, monkeypatch, *call, "--out", "all")
    assert (code, kept(out)["images"]) == (0, {"train": 8, "test": 4})
    assert err.startswith("vitscope: leaky: 1 training image is in the test set too (1 exact pair and 0 near): ")
    assert err.count("\n") == 1
    code, out, err = run(capsys, monkeypatch, *call, "--out", "dropped", "--drop-duplicates")
    assert (code, kept(out)["images"], err) == (0, {"train": 7, "test": 4}, "")


@pytest.mark.usefixtures("leaky")
def test_a_image_that_cannot_be_read_is_refused_or_skipped(tmp_path, capsys, monkeypatch):
    Path("leaky/train/blue/3.png").write_bytes(b"no image")
    call = ("finetune", "leaky", *QUICK, "--out", "run", "--drop-duplicates")
    code, out, err = run(capsys, monkeypatch, *call)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "1 image of leaky cannot be read: leaky/train/blue/3.png is not an image" in err
    assert not (tmp_path / "run").exists()
    code, out, err = run(capsys, monkeypatch, *call, "--unreadable", "skip", "--json")
    assert (code, kept(out)["images"]) == (0, {"train": 6, "test": 4})
    assert err.startswith("vitscope: 1 image of leaky cannot be read: leaky/train/blue/3.png")
    assert err.endswith("skipped\n")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("birds")
def test_a_recipe_may_be_a_file(capsys, monkeypatch):
    Path("own.toml").write_text('base = "report"\nbatch_size = 8\nepochs = 1\n', encoding="utf-8")
    code, out, _ = run(capsys, monkeypatch, "finetune", "birds", "--recipe", "own.toml", "--json")
    assert (code, kept(out)["recipe"]["batch_size"]) == (0, 8)


# compare


@pytest.mark.usefixtures("birds")
def test_compare_writes_a_report_and_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    call = ("compare", "birds", *QUICK, "--models", "vit-nano, swin-nano", "--tunings", "head,lora", "--seeds", "1")
    code, out, err = run(capsys, monkeypatch, *call)
    cells = [f"{model}, {tuning}, seed 0" for model in ("vit-nano", "swin-nano") for tuning in ("head", "lora")]
    assert (code, epochs(err)) == (0, [f"{cell}: step 2 of 2" for cell in cells])
    names = ["accuracy", "attention-swin-nano", "attention-vit-nano", "confusion", "curves", "data"]
    there = files(tmp_path / "birds-comparison")
    assert [name for name in there if name.endswith(".png")] == [f"{name}.png" for name in names]
    assert {"report.html", "comparison.json"} <= set(there)
    assert not [name for name in there if name.endswith(".safetensors")]
    assert out.endswith("wrote birds-comparison/report.html and 6 figures beside it\n")
    about = kept(Path("birds-comparison/comparison.json").read_text(encoding="utf-8"))
    for one in about["summaries"]:
        (line,) = (line for line in out.splitlines() if line.split()[:2] == [one["model"], one["tuning"]])
        assert f"{one['accuracy']:.1%}" in line
    assert any(line.split()[:4] == ["lora", "swin-nano", "over", "vit-nano"] for line in out.splitlines())
    untrained(monkeypatch)
    undrawn(monkeypatch)
    code, out, err = run(capsys, monkeypatch, *call, "--json")
    assert (code, err) == (0, "")
    again = kept(out)
    assert again.pop("files")[0] == "birds-comparison/report.html"
    assert again == about
    code, out, err = run(capsys, monkeypatch, *call, "--learning-rate", "0.5")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "holds a cell with another recipe" in err


@pytest.mark.usefixtures("leaky")
def test_compare_drops_skips_and_keeps_as_it_is_told(tmp_path, capsys, monkeypatch):
    Path("leaky/train/blue/3.png").write_bytes(b"no image")
    undrawn(monkeypatch)
    options = ("--drop-duplicates", "--unreadable", "skip", "--keep-models", "--out", "out", "--json")
    code, out, err = run(capsys, monkeypatch, "compare", "leaky", *SMALL, *options)
    assert (code, err.count("\n")) == (0, 1)
    assert kept(out)["inspection"]["unreadable"][0].startswith("leaky/train/blue/3.png")
    cell = json.loads((tmp_path / "out/cells/vit-nano-head-0/cell.json").read_text(encoding="utf-8"))
    assert cell["images"] == {"train": 6, "test": 4}
    assert vs.load(tmp_path / "out/cells/vit-nano-head-0").labels == ("blue", "red")


@pytest.mark.usefixtures("birds")
def test_compare_takes_a_rank_and_stops_early(tmp_path, capsys, monkeypatch):
    undrawn(monkeypatch)
    options = ("--models", "vit-nano", "--tunings", "head,lora", "--seeds", "1", "--rank", "3", "--early-stop", "2")
    code, out, _ = run(capsys, monkeypatch, "compare", "birds", *QUICK, *options, "--out", "out", "--json")
    assert code == 0
    assert kept(out)["recipe"]["early_stop"] == 2
    assert kept(out)["recipe"]["validation"] == 0.1
    about = [json.loads((tmp_path / f"out/cells/vit-nano-{t}-0/cell.json").read_text()) for t in ("head", "lora")]
    assert [one["rank"] for one in about] == [None, 3]
    vit = vs.load("vit-nano").module
    width, blocks = vit.config.hidden_size, vit.config.num_hidden_layers
    assert about[1]["trained"] == blocks * 2 * 2 * width * 3
    code, _, err = run(capsys, monkeypatch, "compare", "birds", *QUICK, "--tunings", "head,bitfit", "--rank", "3")
    assert (code, err.count("\n")) == (2, 1)
    assert "none of head, bitfit has one" in err
