"""The commands ``vitscope models`` and ``vitscope methods``."""

import json

from tests.helpers.command_line import call


def test_models_lists_every_library(capsys, monkeypatch):
    code, out, _ = call(capsys, monkeypatch, "models", "--json")
    assert code == 0
    assert {row["library"] for row in json.loads(out)} == {"vitscope", "transformers", "timm", "torchvision"}
    code, out, _ = call(capsys, monkeypatch, "models")
    assert "--model vit-nano" in out


def test_models_tells_how_to_install_a_missing_library(capsys, monkeypatch):
    from vitscope.cli import models

    monkeypatch.setattr(models, "_version_or_none", lambda library: None if library == "timm" else "1.0")
    _, out, _ = call(capsys, monkeypatch, "models")
    assert "timm not installed: pip install 'vitscope[timm]'\n" in out
    assert out.count("not installed") == 1
    _, out, _ = call(capsys, monkeypatch, "models", "--json")
    assert [row["library"] for row in json.loads(out) if row["installed"] is None] == ["timm"]


def test_methods_lists_the_registry(capsys, monkeypatch):
    from vitscope.methods.registry import METHODS

    code, out, _ = call(capsys, monkeypatch, "methods", "--json")
    assert code == 0
    assert [row["method"] for row in json.loads(out)] == list(METHODS)
    code, out, _ = call(capsys, monkeypatch, "methods")
    assert code == 0
    assert "occlusion" in out
