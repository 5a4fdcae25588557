"""docs/bring-your-own-model.md: its code and its commands run, and its table quotes real messages."""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import vitscope as vs
from tests.helpers.command_line import call
from tests.helpers.families import TINY
from tests.helpers.text_image import save, text_image
from tests.helpers.tiny import photo, tiny_vit

timm = pytest.importorskip("timm")
pytest.importorskip("torchvision")

PAGE = Path(__file__).parents[2] / "docs" / "bring-your-own-model.md"
LABELS = ["cat", "dog", "owl"]
SMALL = TINY | {"image_size": 32, "patch_size": 8}

pytestmark = [
    pytest.mark.usefixtures("coarse_figures"),
    # The page describes the warnings of its examples.
    pytest.mark.filterwarnings("ignore::vitscope.errors.VitscopeWarning"),
    # peft reads an attribute that transformers has renamed.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def sections(text: str) -> dict[str, str]:
    """Return the text below each heading, by heading."""
    pieces = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


SECTIONS = sections(PAGE.read_text(encoding="utf-8"))


def network(**options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("test_vit", **({"num_classes": 3} | options)).eval()


# The files in the working directory, and the names, that a section presupposes.


def lightning_checkpoint() -> dict[str, Any]:
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = network()

    state = Classifier().state_dict()
    checkpoint = {"state_dict": state, "epoch": 1, "pytorch-lightning_version": lightning.__version__}
    torch.save(checkpoint, "last.ckpt")
    torch.save({"state_dict": state | {"loss.weight": torch.ones(3, device="cpu")}}, "with-loss.ckpt")
    return {"Classifier": Classifier}


def processor(folder: str) -> None:
    import transformers

    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def adapter() -> dict[str, Any]:
    peft = pytest.importorskip("peft")
    import transformers

    tiny_vit().save_pretrained("base")
    processor("base")
    base = transformers.AutoModelForImageClassification.from_pretrained("base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    live = peft.get_peft_model(base, config)
    live.save_pretrained("adapter")
    live.save_pretrained("adapter-without-base")
    file = Path("adapter-without-base", "adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    return {}


def grey() -> dict[str, Any]:
    photo(90, 80).convert("L").save("scan.png")
    torch.save(network(in_chans=1, num_classes=2, img_size=96).state_dict(), "grey.pth")
    return {}


def clip() -> dict[str, Any]:
    import transformers

    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    text = TINY | {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(vision_config=SMALL, text_config=text, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained("clip-folder")
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessorPil(**sizes).save_pretrained("clip-folder")
    for index, label in enumerate(["cat", "dog"]):
        Path("few", label).mkdir(parents=True)
        photo(40, 40, seed=index).save(f"few/{label}/1.png")
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    words = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1}
    return {"clip": open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=words).eval()}


def texts() -> dict[str, Any]:
    save("clip", Path("clip-folder"))
    return {}


def timm_folder() -> dict[str, Any]:
    timm.models.save_for_hf(network(), "timm-folder", model_config={"label_names": LABELS})
    Path("base").mkdir()
    processor("base")
    return {}


def swin() -> dict[str, Any]:
    import torchvision

    torch.save(torchvision.models.get_model("swin_t", weights=None, num_classes=3).state_dict(), "swin.pth")
    return {}


def hyperparameters() -> dict[str, Any]:
    content = {"state_dict": network().state_dict(), "hyper_parameters": argparse.Namespace(rate=0.1)}
    torch.save(content, "hyperparameters.ckpt")
    return {}


PREPARATIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "A Lightning checkpoint": lightning_checkpoint,
    "A PEFT adapter": adapter,
    "A one-channel model": grey,
    "Texts as classes": texts,
    "A CLIP tower": clip,
    "Folders and repositories of timm": timm_folder,
    "Weights for torchvision": swin,
    "Which weights": hyperparameters,
    "How images are prepared": timm_folder,
}


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chelsea: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(chelsea).resize((90, 60)).save("photo.jpg")
    Path("labels.txt").write_text("\n".join(LABELS), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("title", [title for title, text in SECTIONS.items() if blocks(text, "python")])
def test_the_code_of_a_section_runs(title: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__", **PREPARATIONS.get(title, dict)()}
    for code in blocks(SECTIONS[title], "python"):
        exec(compile(code, f"{PAGE.name}: {title}", "exec"), namespace)
    printed = capsys.readouterr().out
    for output in blocks(SECTIONS[title], "text"):
        assert output in printed
    for command in blocks(SECTIONS[title], "sh"):
        for line in command.splitlines():
            code, _, err = call(capsys, monkeypatch, *line.split()[1:])
            assert (code, "Error" in err) == (0, False), err


def test_every_link_leads_to_a_section() -> None:
    titles = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in SECTIONS}
    links = re.findall(r"\]\(#([\w-]+)\)", PAGE.read_text(encoding="utf-8"))
    assert links
    assert titles.issuperset(links)


# The table of refusals


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = network(num_classes=0)
        self.species, self.age = nn.Linear(64, 3), nn.Linear(64, 2)

    def forward(self, pixels: Any) -> Any:
        features = self.backbone(pixels)
        return {"species": self.species(features), "age": self.age(features)}


class MeanOfPatches(Heads):
    def forward(self, pixels: Any) -> Any:
        return self.species(self.backbone.forward_features(pixels)[:, 1:].mean(1))


class Tokens(Heads):
    def forward(self, pixels: Any) -> Any:
        return self.backbone.forward_features(pixels)


def bare_transformer() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.Flatten(2), Swap(), nn.TransformerEncoderLayer(32, 2, 64))
    layers[3].self_attn.batch_first = True
    return layers


class Swap(nn.Module):
    def forward(self, tokens: Any) -> Any:
        return tokens.transpose(1, 2)


def saved(state: dict[str, Any], name: str = "weights.pth") -> str:
    torch.save(state, name)
    return name


def without_classifier() -> None:
    tiny_vit().save_pretrained("folder")
    file = Path("folder", "model.safetensors")
    state = load_file(file)
    del state["classifier.weight"], state["classifier.bias"]
    save_file(state, file, {"format": "pt"})
    vs.load("folder")


def damaged() -> None:
    saved(network().state_dict())
    content = Path("weights.pth").read_bytes()
    Path("weights.pth").write_bytes(content[: len(content) // 2])
    vs.load("timm:test_vit", weights="weights.pth")


def nameless_adapter() -> None:
    adapter()
    vs.load("adapter-without-base")


def text_model() -> None:
    import transformers

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    vs.load(transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=9)))


PIXELS = torch.zeros(1, 3, 160, 160, device="cpu")
NO_PHOTOS = {"in_chans": 1, "img_size": 96}

REFUSALS: dict[str, Callable[[], Any]] = {
    "holds weights only: name the architecture": lambda: vs.load(saved(network().state_dict())),
    "does not fit": lambda: vs.load("timm:test_vit2", weights=saved({"state_dict": network().state_dict()})),
    "2 of another shape": lambda: vs.load("timm:test_vit", weights=saved(network(**NO_PHOTOS).state_dict())),
    "vitscope does not run on random weights": without_classifier,
    "holds more than weights": lambda: vs.load(
        "timm:test_vit", weights=saved({"state_dict": network().state_dict(), "options": argparse.Namespace()})
    ),
    "holds several sets of weights": lambda: vs.load(
        "timm:test_vit", weights=saved({"model": network().state_dict(), "model_ema": network().state_dict()})
    ),
    "is damaged or truncated": damaged,
    "does not name its base model": nameless_adapter,
    "came without preprocessing": lambda: vs.load(network(**NO_PHOTOS)).predict("photo.jpg"),
    "which could be classes or an embedding": lambda: vs.load(MeanOfPatches()).predict(PIXELS),
    "returns several outputs": lambda: vs.load(Heads()).predict(PIXELS),
    "returns neither classes nor features that vitscope recognises": lambda: vs.load(Tokens()).predict(PIXELS),
    "has no text tower": lambda: vs.load(text_image("clip").vision_model, labels=["a cat", "a dog"]),
    "has no tokenizer": lambda: vs.load(text_image("clip"), labels=["a cat", "a dog"]),
    "has no classifier": lambda: vs.load(network(num_classes=0)).predict(PIXELS),
    "the token grid of this model is unknown": lambda: vs.rollout(bare_transformer(), PIXELS),
    "the readout of this model is unknown": lambda: vs.rollout(vs.load(MeanOfPatches(), output="logits"), PIXELS),
    "but its layout says": lambda: vs.check(
        vs.load(bare_transformer(), patch_size=4, readout="patches", image_size=32)
    ),
    "weights are not for a live module": lambda: vs.load(network(), weights="weights.pth"),
    "device and dtype are not for a live module": lambda: vs.load(network(), device="cpu"),
    "which does not take images": text_model,
}


def rows() -> list[list[str]]:
    """Return the quotes in each row of the table."""
    lines = SECTIONS["When something is refused"].splitlines()
    return [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in lines if line.startswith("| `")]


@pytest.mark.slow
@pytest.mark.parametrize("quotes", rows(), ids=lambda quotes: quotes[0])
def test_the_table_quotes_the_message(quotes: list[str]) -> None:
    with pytest.raises(vs.VitscopeError) as caught:
        REFUSALS[quotes[0]]()
    for quote in quotes:
        assert quote in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_row_of_the_table_is_tested() -> None:
    assert {quotes[0] for quotes in rows()} == REFUSALS.keys()
