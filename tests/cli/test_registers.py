"""The command ``vitscope registers``."""

import numpy as np
import pytest
import torch
from PIL import Image

import vitscope as vs
from tests.helpers.command_line import call, needs_bundled, photo_in_an_empty_folder, printed_results
from tests.helpers.planted_artefacts import PLAIN, planted
from vitscope.cli import attention, registers, rollout

photo = photo_in_an_empty_folder


@needs_bundled
def test_a_model_without_artefacts_says_so(photo, capsys, monkeypatch, tmp_path):
    code, out, _ = call(capsys, monkeypatch, "registers", photo, "--json", "--out", "map.png")
    assert code == 0
    entry = printed_results(out)[0]
    assert (entry["threshold"], entry["share"]) == (None, 0.0)
    assert np.shape(entry["places"]) == (8, 8)
    assert (tmp_path / "map.png").exists()
    code, _, err = call(capsys, monkeypatch, "registers", photo, "--count", "1")
    assert code == 2
    assert err.startswith("vitscope: no valley between the norms after block 6 (index 5), highest ")
    assert err.count("\n") == 1


@pytest.fixture
def planted_photos(monkeypatch, tmp_path) -> list[str]:
    """Return the names of photos in an empty folder, whose pixels become the planted images of the loaded model."""
    monkeypatch.chdir(tmp_path)
    example = planted()
    model = vs.load(example.model.module, image_size=(64, 96), mean=[0.5] * 3, std=[0.5 / 3] * 3)
    names = [f"{index}.png" for index in range(len(example.pixels))]
    for name, pixels in zip(names, example.pixels, strict=True):
        unit = (pixels / 6 + 0.5).clamp(0, 1)
        Image.fromarray((unit * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(name)
    for command in (registers, attention, rollout):
        monkeypatch.setattr(command, "load_model", lambda *_, **__: model)
    return names


@pytest.mark.usefixtures("coarse_figures")
def test_registers_remove_the_artefacts_of_every_photo(planted_photos, capsys, monkeypatch, tmp_path):
    code, out, _ = call(capsys, monkeypatch, "registers", *planted_photos, "--count", "1", "--neurons", "1", "--json")
    assert code == 0
    for entry in printed_results(out):
        assert entry["neurons"] == [[1, 7]]
        assert [tuple(place) for place in np.argwhere(entry["places"])] == list(PLAIN)
        assert entry["with_registers"]["threshold"] is None
        assert (tmp_path / entry["figure"]).exists()
        assert list(entry["registers"]) == [f"register_{number}" for number in range(1, 5)]
        assert list(entry["with_registers"]["registers"])[-1] == "test_register_1"
        assert np.shape(entry["with_registers"]["registers"]["test_register_1"]) == (8, 12)


@pytest.mark.usefixtures("coarse_figures")
@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["attention", "--layer", "-1"], ["rollout", "--head-fusion", "mean"]], ids=" ".join
)
def test_artefacts_are_dropped(planted_photos, capsys, monkeypatch, tmp_path, arguments):
    """One photo alone has too few artefacts for a threshold; all photos together have one."""
    code, out, _ = call(capsys, monkeypatch, *arguments, *planted_photos[:3], "--drop-artefacts", "--json")
    assert code == 0
    for entry in printed_results(out):
        results = entry.get("rollouts") or [
            {"values": values, "provenance": entry["provenance"]} for values in entry["values_mean_of_heads"].values()
        ]
        for result in results:
            record = result["provenance"]["dropped_artefacts"]
            assert [tuple(patch) for patch in record["patches"][0]] == list(PLAIN)
            values = np.array(result["values"])
            assert [tuple(patch) for patch in np.argwhere(values == 0)] == list(PLAIN)
        assert (tmp_path / entry["figure"]).exists()
    code, out, _ = call(capsys, monkeypatch, *arguments, planted_photos[0], "--drop-artefacts", "--json")
    assert code == 0
    assert '"reason": "no valley between the norms' in out


@needs_bundled
@pytest.mark.parametrize("command", ["attention", "rollout"])
def test_a_window_transformer_has_no_artefacts_to_drop(photo, capsys, monkeypatch, command):
    code, _, err = call(capsys, monkeypatch, command, photo, "--model", "swin-nano", "--drop-artefacts")
    assert code != 0
    assert "artefact tokens are not supported for swin-nano, a window transformer" in err
    assert err.count("\n") == 1
