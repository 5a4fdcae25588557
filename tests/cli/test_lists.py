"""The commands ``vitscope models`` and ``vitscope methods``."""

import pytest

from tests.helpers.command_line import call, printed_results


def test_models_lists_every_library(capsys, monkeypatch):
    code, out, _ = call(capsys, monkeypatch, "models", "--json")
    assert code == 0
    assert {row["library"] for row in printed_results(out)} == {"vitscope", "transformers", "timm", "torchvision"}
    code, out, _ = call(capsys, monkeypatch, "models")
    assert "--model vit-nano" in out


def test_models_tells_how_to_install_a_missing_library(capsys, monkeypatch):
    from vitscope.cli import models

    monkeypatch.setattr(models, "_version_or_none", lambda library: None if library == "timm" else "1.0")
    _, out, _ = call(capsys, monkeypatch, "models")
    assert "timm not installed: pip install 'vitscope[timm]'\n" in out
    assert out.count("not installed") == 1
    _, out, _ = call(capsys, monkeypatch, "models", "--json")
    assert [row["library"] for row in printed_results(out) if row["installed"] is None] == ["timm"]


def test_methods_lists_the_registry(capsys, monkeypatch):
    from vitscope.methods.registry import METHODS

    code, out, _ = call(capsys, monkeypatch, "methods", "--json")
    assert code == 0
    assert [row["method"] for row in printed_results(out)] == list(METHODS)
    assert {row["kind"] for row in printed_results(out)} == {"attention", "perturbation", "gradient"}
    code, out, _ = call(capsys, monkeypatch, "methods")
    assert code == 0
    assert "occlusion" in out


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_the_table_of_methods_fits_the_terminal(capsys, monkeypatch, columns):
    from vitscope.methods.registry import METHODS

    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = call(capsys, monkeypatch, "methods")
    assert max(map(len, out.splitlines())) <= columns
    words = out.split()
    assert all(name in words for name in METHODS), "names are never cut"
    assert out.count("1 + a backward") == sum(method.forwards == "1 + a backward" for method in METHODS.values())
    assert ("Selvaraju et al., 2017" in out) == (columns >= 120)
