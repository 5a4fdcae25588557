"""The commands that train: what they print and write, and the same call again."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vitscope as vs
from tests.cli.test_app import needs_bundled, run
from tests.helpers.coloured import coloured_folder
from tests.helpers.command_line import printed_results
from vitscope.cli.json_output import rounded
from vitscope.cli.training import attribute_help
from vitscope.tune import comparison as comparison_module
from vitscope.tune import finetune as finetune_module
from vitscope.tune.data_options import DataOptions
from vitscope.tune.recipe import Recipe
from vitscope.views import comparison_page

pytestmark = [needs_bundled, pytest.mark.usefixtures("quick_comparisons", "coarse_figures")]
QUICK = ("--epochs", "1", "--batch-size", "4")
SMALL = (*QUICK, "--models", "vit-nano", "--tunings", "head", "--seeds", "1")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, with a terminal that is wide enough for every column."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(name="birds")
def folder_of_images(tmp_path: Path) -> Path:
    """Write ten images of two classes, of which two are for testing."""
    return coloured_folder(tmp_path / "birds", {"red": 5, "blue": 5})


@pytest.fixture(name="leaky")
def folder_with_a_leak(tmp_path: Path) -> Path:
    """Write a train and a test folder that share one image."""
    coloured_folder(tmp_path / "leaky/train", {"red": 4, "blue": 4})
    coloured_folder(tmp_path / "leaky/test", {"red": 2, "blue": 2}, seed=1)
    (tmp_path / "leaky/train/red/0.png").write_bytes((tmp_path / "leaky/test/red/1.png").read_bytes())
    return tmp_path / "leaky"


def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was trained")

    monkeypatch.setattr(finetune_module._Run, "train", refuse)
    monkeypatch.setattr(comparison_module, "finetune", refuse)


def skip_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace figures, because drawing takes longer than everything else."""
    monkeypatch.setattr(comparison_page, "figure_png", lambda *_: b"a figure")


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def epochs(err: str) -> list[str]:
    """Return the lines that are printed after every epoch without a terminal, without the accuracies."""
    lines = [line.partition(", accuracy ") for line in err.splitlines()]
    assert all(0 <= float(accuracy.removesuffix("%")) <= 100 for _, _, accuracy in lines)
    return [step for step, _, _ in lines]


def printed_result(text: str) -> Any:
    """Return the one result that ``--json`` printed."""
    (record,) = printed_results(text)
    return record


# data


@pytest.mark.slow
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
def test_data_as_json_equals_the_check_in_python(capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, "data", "leaky", "--json", "--out", "mine.png")
    assert (code, err) == (0, "")
    assert printed_result(out) == vs.check_data(vs.load_data("leaky")).as_json() | {"figure": "mine.png"}
    (pair,) = printed_result(out)["duplicates"]
    assert pair == {"train": "leaky/train/red/0.png", "test": "leaky/test/red/1.png", "exact": True}
    assert Path("mine.png").is_file()


@pytest.mark.usefixtures("birds")
def test_data_passes_the_options_of_the_split(capsys, monkeypatch):
    from vitscope.tune import data

    passed, load = [], data.load_data
    monkeypatch.setattr(data, "load_data", lambda name, options: passed.append(options) or load(name, options))
    options = ("--test-share", "0.4", "--per-class", "2", "--split-seed", "3", "--json")
    code, out, _ = run(capsys, monkeypatch, "data", "birds", *options)
    assert code == 0
    assert printed_result(out)["classes"] == {"blue": {"train": 2, "test": 2}, "red": {"train": 2, "test": 2}}
    assert passed == [DataOptions(test_share=0.4, split_seed=3, per_class=2)]


@pytest.mark.usefixtures("leaky")
def test_data_lists_files_that_cannot_be_read(capsys, monkeypatch):
    Path("leaky/train/blue/3.png").write_bytes(b"no image")
    code, out, _ = run(capsys, monkeypatch, "data", "leaky")
    assert code == 0
    assert "1 training image is also in the test set (1 exact pair and 0 near), 0 of them with different labels" in out
    assert "1 file counted above cannot be read as an image\nunreadable: leaky/train/blue/3.png is not a" in out


# finetune


@pytest.mark.slow
@pytest.mark.usefixtures("birds")
def test_finetune_writes_a_folder_that_explain_takes(tmp_path, capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, "finetune", "birds", *QUICK, "--tuning", "layernorm")
    folder = "birds-vit-nano-layernorm"
    assert (code, epochs(err)) == (0, ["vit-nano, layernorm: step 2 of 2"])
    assert out.endswith(f"wrote {folder}: explain it with --model {folder}\n")
    names = {"log.jsonl", "result.json", "run.json", "report.png", "model/vitscope.json", "model/model.safetensors"}
    assert names <= set(files(tmp_path / folder))
    record = json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))
    for words in (
        "vit-nano, layernorm, on birds",
        f"{record['accuracy']:.1%}",
        f"{record['macro_f1']:.3f}",
        f"{record['num_trained']:,}",
    ):
        assert words in out
    code, out, err = run(capsys, monkeypatch, "explain", "birds/red/0.png", "--model", folder, "--json")
    assert (code, err) == (0, "")
    (entry,) = printed_results(out)
    assert {prediction["label"] for prediction in entry["predictions"]} == {"red", "blue"}
    forbid_training(monkeypatch)
    before = Path(folder, "model/model.safetensors").read_bytes()
    code, out, _ = run(capsys, monkeypatch, "finetune", "birds", *QUICK, "--tuning", "layernorm")
    assert (code, out.splitlines()[-1]) == (0, f"{folder} was finished before: explain it with --model {folder}")
    assert Path(folder, "model/model.safetensors").read_bytes() == before
    # a run with other settings is refused
    code, out, err = run(capsys, monkeypatch, "finetune", "birds", *QUICK, "--tuning", "head", "--out", folder)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "holds a run with another tuning" in err


@pytest.mark.slow
@pytest.mark.usefixtures("birds")
def test_finetune_as_json_is_the_result_without_its_lists(capsys, monkeypatch):
    options = (*QUICK, "--out", "run", "--json", "--model", "swin-nano", "--learning-rate", "0.01", "--seed", "4")
    code, out, err = run(capsys, monkeypatch, "finetune", "birds", *options, "--recipe", "report")
    assert (code, err) == (0, "")
    record, result = printed_result(out), json.loads(Path("run/result.json").read_text(encoding="utf-8"))
    assert record.pop("folder") == "run"
    left_out = ("predictions", "true_labels", "history")
    assert record == rounded({name: value for name, value in result.items() if name not in left_out})
    assert (record["model"], record["tuning"], record["images"]) == ("swin-nano", "head", {"train": 8, "test": 2})
    recipe = record["recipe"]
    assert (recipe["epochs"], recipe["batch_size"], recipe["learning_rate"], recipe["seed"]) == (1, 4, 0.01, 4)
    assert (recipe["schedule"], recipe["augment"]) == ("constant", []), "the report's recipe"


@pytest.mark.slow
@pytest.mark.usefixtures("leaky")
def test_duplicates_are_reported_or_dropped(capsys, monkeypatch):
    call = ("finetune", "leaky", *QUICK, "--json")
    code, out, err = run(capsys, monkeypatch, *call, "--out", "all")
    assert (code, printed_result(out)["images"]) == (0, {"train": 8, "test": 4})
    assert err.startswith("vitscope: leaky: 1 training image is also in the test set (1 exact pair and 0 near): ")
    assert err.count("\n") == 1
    code, out, err = run(capsys, monkeypatch, *call, "--out", "dropped", "--drop-duplicates")
    assert (code, printed_result(out)["images"], err) == (0, {"train": 7, "test": 4}, "")


@pytest.mark.slow
@pytest.mark.usefixtures("leaky")
def test_an_image_that_cannot_be_read_is_refused_or_skipped(tmp_path, capsys, monkeypatch):
    Path("leaky/train/blue/3.png").write_bytes(b"no image")
    call = ("finetune", "leaky", *QUICK, "--out", "run", "--drop-duplicates")
    code, out, err = run(capsys, monkeypatch, *call)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "1 image of leaky cannot be read: leaky/train/blue/3.png is not an image" in err
    assert not (tmp_path / "run").exists()
    code, out, err = run(capsys, monkeypatch, *call, "--unreadable", "skip", "--json")
    assert (code, printed_result(out)["images"]) == (0, {"train": 6, "test": 4})
    assert err.startswith("vitscope: 1 image of leaky cannot be read: leaky/train/blue/3.png")
    assert err.endswith("skipped\n")
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("birds")
def test_a_recipe_can_be_a_file(capsys, monkeypatch):
    Path("own.toml").write_text('base = "report"\nbatch_size = 8\nepochs = 1\n', encoding="utf-8")
    code, out, _ = run(capsys, monkeypatch, "finetune", "birds", "--recipe", "own.toml", "--json")
    assert (code, printed_result(out)["recipe"]["batch_size"]) == (0, 8)


@pytest.mark.slow
@pytest.mark.usefixtures("birds")
def test_the_seed_of_a_recipe_is_used_unless_another_is_passed(capsys, monkeypatch):
    Path("own.toml").write_text("seed = 7\n", encoding="utf-8")
    call = ("finetune", "birds", *QUICK, "--recipe", "own.toml", "--json")
    seeds = []
    for options in (("--out", "first"), ("--out", "second", "--seed", "0")):
        code, out, _ = run(capsys, monkeypatch, *call, *options)
        assert code == 0
        seeds.append(printed_result(out)["recipe"]["seed"])
    assert seeds == [7, 0]


@pytest.mark.parametrize("owner", [DataOptions, Recipe])
def test_every_option_has_its_help_in_the_docstring(owner):
    texts = attribute_help(owner)
    assert list(texts) == [field.name for field in dataclasses.fields(owner)]
    assert all(text[0].isupper() and text.endswith(".") for text in texts.values())


# compare


@pytest.mark.slow
@pytest.mark.usefixtures("birds")
def test_compare_writes_a_report_and_reads_finished_cells_again(tmp_path, capsys, monkeypatch):
    call = ("compare", "birds", *QUICK, "--models", "vit-nano, swin-nano", "--tunings", "head,lora", "--seeds", "1")
    code, out, err = run(capsys, monkeypatch, *call)
    cells = [f"{model}, {tuning}, seed 0" for model in ("vit-nano", "swin-nano") for tuning in ("head", "lora")]
    assert (code, epochs(err)) == (0, [f"{cell}: step 2 of 2" for cell in cells])
    names = ["accuracy", "attention-swin-nano", "attention-vit-nano", "confusion", "curves", "data"]
    written = files(tmp_path / "birds-comparison")
    assert [name for name in written if name.endswith(".png")] == [f"{name}.png" for name in names]
    assert {"report.html", "comparison.json"} <= set(written)
    assert not [name for name in written if name.endswith(".safetensors")]
    assert out.endswith("wrote birds-comparison/report.html and 6 figures next to it\n")
    record = rounded(json.loads(Path("birds-comparison/comparison.json").read_text(encoding="utf-8")))
    for summary in record["summaries"]:
        (line,) = (line for line in out.splitlines() if line.split()[:2] == [summary["model"], summary["tuning"]])
        assert f"{summary['accuracy']:.1%}" in line
    assert any(line.split()[:4] == ["lora", "swin-nano", "over", "vit-nano"] for line in out.splitlines())
    forbid_training(monkeypatch)
    skip_drawing(monkeypatch)
    code, out, err = run(capsys, monkeypatch, *call, "--json")
    assert (code, err) == (0, "")
    again = printed_result(out)
    assert again.pop("files")[0] == "birds-comparison/report.html"
    assert again == record
    code, out, err = run(capsys, monkeypatch, *call, "--learning-rate", "0.5")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "holds a cell with another recipe" in err


@pytest.mark.slow
@pytest.mark.usefixtures("leaky")
def test_compare_passes_the_options_of_the_data_set(tmp_path, capsys, monkeypatch):
    Path("leaky/train/blue/3.png").write_bytes(b"no image")
    skip_drawing(monkeypatch)
    options = ("--drop-duplicates", "--unreadable", "skip", "--keep-models", "--out", "out", "--json")
    code, out, err = run(capsys, monkeypatch, "compare", "leaky", *SMALL, *options)
    assert (code, err.count("\n")) == (0, 1)
    assert printed_result(out)["data_check"]["unreadable"][0].startswith("leaky/train/blue/3.png")
    cell = json.loads((tmp_path / "out/cells/vit-nano-head-0/cell.json").read_text(encoding="utf-8"))
    assert cell["images"] == {"train": 6, "test": 4}
    assert vs.load(tmp_path / "out/cells/vit-nano-head-0").labels == ("blue", "red")


@pytest.mark.slow
@pytest.mark.usefixtures("birds")
def test_compare_passes_rank_and_early_stopping(tmp_path, capsys, monkeypatch):
    skip_drawing(monkeypatch)
    options = ("--models", "vit-nano", "--tunings", "head,lora", "--seeds", "1", "--rank", "3", "--early-stop", "2")
    code, out, _ = run(capsys, monkeypatch, "compare", "birds", *QUICK, *options, "--out", "out", "--json")
    assert code == 0
    assert printed_result(out)["recipe"]["early_stop"] == 2
    assert printed_result(out)["recipe"]["validation"] == 0.1
    records = [json.loads((tmp_path / f"out/cells/vit-nano-{t}-0/cell.json").read_text()) for t in ("head", "lora")]
    assert [record["rank"] for record in records] == [None, 3]
    vit = vs.load("vit-nano").module
    width, blocks = vit.config.hidden_size, vit.config.num_hidden_layers
    assert records[1]["num_trained"] == blocks * 2 * 2 * width * 3
    code, _, err = run(capsys, monkeypatch, "compare", "birds", *QUICK, "--tunings", "head,bitfit", "--rank", "3")
    assert (code, err.count("\n")) == (2, 1)
    assert "none of head, bitfit has a rank" in err
