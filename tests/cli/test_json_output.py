"""The JSON of the commands: one shape, nine significant digits, and no figure if none is wanted."""

import json

import pytest

from tests.helpers.command_line import call, needs_bundled, photo_in_an_empty_folder, printed_results
from vitscope.cli.json_output import print_results, rounded

pytestmark = needs_bundled
photo = photo_in_an_empty_folder


def test_numbers_have_nine_significant_digits(capsys):
    values = [
        0.1 + 0.2,
        123456789012.0,
        -1.23456789012e-20,
        5,
        True,
        "0.1234567890123",
        None,
        float("nan"),
        float("inf"),
    ]
    expected = [0.3, 123456789000.0, -1.23456789e-20, 5, True, "0.1234567890123", None, None, None]
    assert rounded({"a": (values, {"b": values})}) == {"a": [expected, {"b": expected}]}
    print_results("explain", [{"values": values}])
    (result,) = printed_results(capsys.readouterr().out)
    assert result == {"values": expected}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "keys"),
    [
        (["attention", "cat.png", "--layer", "1"], {"image", "figure", "values_mean_of_heads"}),
        (["rollout", "cat.png"], {"image", "figure", "rollouts"}),
        (["heads", "cat.png", "--by", "gradient"], {"image", "figure", "values", "supporting"}),
        (["registers", "cat.png"], {"image", "figure", "threshold"}),
        (["lime", "cat.png", "-n", "70", "--segments", "patches"], {"image", "figure", "results"}),
        (
            ["compose", "cat.png", "--object", "cat=105,20,120,100", "--test", "split", "--no-attention"],
            {"image", "files", "results"},
        ),
        (["models"], {"library", "example"}),
        (["methods"], {"method", "kind"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_every_command_prints_one_shape(photo, tmp_path, capsys, monkeypatch, command, keys):
    no_figure = ["--no-figure"] if photo in command else []
    code, out, err = call(capsys, monkeypatch, *command, "--json", *no_figure)
    assert (code, err) == (0, "")
    results = printed_results(out)
    assert json.loads(out)["command"] == command[0]
    assert all(keys <= result.keys() for result in results)
    assert [result["figure"] for result in results if "figure" in result] == [None] * ("figure" in keys)
    assert [path.name for path in tmp_path.iterdir()] == [photo], "no file is written"


@pytest.mark.slow
def test_without_a_figure_tables_are_printed(photo, tmp_path, capsys, monkeypatch):
    code, out, err = call(capsys, monkeypatch, "heads", photo, "--by", "gradient", "--no-figure")
    assert (code, err) == (0, "")
    assert "supports" in out
    assert "wrote" not in out
    assert [path.name for path in tmp_path.iterdir()] == [photo]


@pytest.mark.slow
def test_compose_without_figures_writes_its_tables_to_a_folder(photo, tmp_path, capsys, monkeypatch):
    options = ("--object", "cat=105,20,120,100", "--test", "split,controls", "--no-attention", "--out", "made")
    code, out, err = call(capsys, monkeypatch, "compose", photo, *options, "--no-figure")
    assert (code, err) == (0, "")
    assert "effects on vit-nano" in out
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["result.json", "table.csv"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("rollout", "cat.png", "--out", "x.png"),
        ("rollout", "cat.png", "--skip-existing"),
        ("compose", "cat.png", "--object", "1,2,30,40", "--out", "x.html"),
        ("data", "nowhere", "--out", "x.png"),
    ],
    ids=" ".join,
)
def test_no_figure_contradicts_a_file(photo, tmp_path, capsys, monkeypatch, arguments):
    code, out, err = call(capsys, monkeypatch, *arguments, "--no-figure")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--no-figure and --" in err
    assert [path.name for path in tmp_path.iterdir()] == [photo]
