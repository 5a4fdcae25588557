"""README and docs: every block of Python runs, and every command line is one that exists."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import vitscope as vs

ROOT = Path(__file__).parents[2]
# docs/bring-your-own-model.md has a test of its own, which brings to each section what its reader brings.
PAGES = [
    ROOT / "README.md",
    *sorted(path for path in (ROOT / "docs").glob("*.md") if "bring-your-own" not in path.name),
]


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Return (line, text) of each block of a language on a page."""
    text = page.read_text(encoding="utf-8")
    matches = re.finditer(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [(text[: match.start()].count("\n") + 1, match[1]) for match in matches]


def class_folders() -> None:
    """Write photos/, with a folder of small images for each of two classes."""
    noise = np.random.default_rng(0)
    for label, tint in (("cats", (200, 90, 40)), ("dogs", (40, 90, 200))):
        folder = Path("photos") / label
        folder.mkdir(parents=True)
        for number in range(6):
            pixels = np.clip(noise.normal(tint, 30, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")


def for_tune() -> dict[str, Any]:
    class_folders()
    vs.finetune(vs.load("swin-nano"), "photos", tuning="lora", epochs=1, out="photos-swin-nano-lora")
    return {}


def for_images() -> dict[str, Any]:
    """Write a photo of 12 bits, a CT and a volume."""
    nibabel, dicom = pytest.importorskip("nibabel"), pytest.importorskip("pydicom").examples.ct
    values = np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save("scan.png")
    dicom.save_as("ct.dcm")
    nibabel.save(nibabel.Nifti1Image(np.stack([values.astype(np.int16) // 4] * 81, -1), np.eye(4)), "brain.nii.gz")
    return {}


def for_cheat() -> dict[str, Any]:
    """Write mri/test, with a bright disc on black for each of two photos of a class."""
    folder = Path("mri/test/pituitary_tumor")
    folder.mkdir(parents=True)
    rows, columns = np.mgrid[:96, :96]
    for radius in (30, 40):
        pixels = np.where((rows - 48) ** 2 + (columns - 48) ** 2 < radius**2, 180, 0).astype(np.uint8)
        Image.fromarray(pixels).convert("RGB").save(folder / f"{radius}.jpg")
    return {}


def for_readme() -> dict[str, Any]:
    """What README takes from its reader: files, and live modules to load."""
    import timm

    from tests.docs import test_bring_your_own_model as page

    open_clip = pytest.importorskip("open_clip")

    class SeveralHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.quality = page.network(), nn.Linear(3, 2)

        def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            species = self.backbone(pixels)
            return {"species": species, "quality": self.quality(species)}

    class_folders()
    page.adapter()
    timm.models.save_for_hf(page.network(), "folder", model_config={"label_names": page.LABELS})
    state = timm.create_model("vit_small_patch16_224", num_classes=3).state_dict()
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}}, "last.ckpt")
    Path("labels.txt").write_text("cat\ndog\nowl\n", encoding="utf-8")
    vision = {"image_size": 64, "patch_size": 32, "width": 32, "layers": 2, "head_width": 16}
    words = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1}
    return {
        "nn": nn,
        "backbone": page.network(num_classes=0),
        "head": nn.Linear(64, 3),
        "scanner": page.network(in_chans=1, img_size=224),
        "clip": open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=words).eval(),
        "several_heads": SeveralHeads(),
        "labels": page.LABELS,
    }


BRING: dict[str, Callable[[], dict[str, Any]]] = {
    "does-my-model-cheat.md": for_cheat,
    "README.md": for_readme,
    "images.md": for_images,
    "tune.md": for_tune,
}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
@pytest.mark.filterwarnings("ignore::vitscope.errors.VitscopeWarning")
# peft asks transformers for an attribute of an older name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_python_of_a_page_runs(
    page: Path, chelsea: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, in one namespace; what pages speak of (a photo, a model, a folder of classes) is there."""
    monkeypatch.chdir(tmp_path)
    photo = Image.fromarray(chelsea)
    for name in ("photo.jpg", "photo.png", "lawn.png"):
        photo.save(name)
    names: dict[str, Any] = {"vs": vs, "photo": chelsea, "model": vs.load("vit-nano")}
    names |= BRING.get(page.name, dict)()
    for line, text in blocks(page, "python"):
        code = compile("\n" * line + text, str(page), "exec")  # so that a traceback names the page's own line
        exec(code, names)


def commands() -> list[Any]:
    lines = [
        (page, line, text.partition("  #")[0].strip())
        for page in [*PAGES, ROOT / "docs" / "bring-your-own-model.md"]
        for line, block in blocks(page, "sh")
        for text in block.replace("\\\n", " ").splitlines()
    ]
    return [
        pytest.param(text.partition("&&")[2].strip() if "&&" in text else text, id=f"{page.name}:{line}-{text}")
        for page, line, text in lines
        if "vitscope " in text and (text.startswith("vitscope") or "&& vitscope" in text)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("text", commands())
def test_a_command_line_is_one_that_exists(text: str) -> None:
    """The parser takes it: the command, each option, and the kind of each value. Nothing runs."""
    import typer.main

    from vitscope.cli import commands as _  # noqa: F401
    from vitscope.cli.app import app

    group = typer.main.get_command(app)
    name, *arguments = shlex.split(text)[1:]
    command = group.commands[name]  # type: ignore[attr-defined]
    command.make_context(name, arguments)
