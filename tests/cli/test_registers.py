"""The command ``vitscope registers``."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import vitscope as vs
from tests.helpers.command_line import call, needs_bundled, photo_in_an_empty_folder
from tests.helpers.planted_artefacts import PLAIN, planted
from vitscope.cli import registers as command

photo = photo_in_an_empty_folder


@needs_bundled
def test_a_model_without_artefacts_says_so(photo, capsys, monkeypatch, tmp_path):
    code, out, _ = call(capsys, monkeypatch, "registers", photo, "--json", "--out", "map.png")
    assert code == 0
    entry = json.loads(out)[0]
    assert (entry["threshold"], entry["share"]) == (None, 0.0)
    assert np.shape(entry["places"]) == (8, 8)
    assert (tmp_path / "map.png").exists()
    code, _, err = call(capsys, monkeypatch, "registers", photo, "--count", "1")
    assert code == 2
    assert err.startswith("vitscope: no valley between the norms after block 5 (highest ")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("coarse_figures")
def test_registers_remove_the_artefacts_of_every_photo(capsys, monkeypatch, tmp_path):
    """The photos are those pixels that become the planted images."""
    monkeypatch.chdir(tmp_path)
    example = planted()
    model = vs.load(example.model.module, image_size=(64, 96), mean=[0.5] * 3, std=[0.5 / 3] * 3)
    names = [f"{index}.png" for index in range(len(example.pixels))]
    for name, pixels in zip(names, example.pixels, strict=True):
        unit = (pixels / 6 + 0.5).clamp(0, 1)
        Image.fromarray((unit * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(name)
    monkeypatch.setattr(command, "load_model", lambda *_, **__: model)
    code, out, _ = call(capsys, monkeypatch, "registers", *names, "--count", "1", "--neurons", "1", "--json")
    assert code == 0
    for entry in json.loads(out):
        assert entry["neurons"] == [[1, 7]]
        assert [tuple(place) for place in np.argwhere(entry["places"])] == list(PLAIN)
        assert entry["with_registers"]["threshold"] is None
        assert (tmp_path / entry["figure"]).exists()
