"""Tiny text-image models of transformers with tokenizers that are built here."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.live import SHAPE, seeded

CONTEXT = 40  # tokens that a text tower reads at most
TEXTS = ["a cat", "a photo of a dog", "owl"]
FAMILIES = ("clip", "siglip")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(folder: Path) -> Any:
    """Return a CLIPTokenizer of single letters and the word "cat", built from vocab.json and merges.txt."""
    import transformers

    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "ca", "cat</w>", START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=CONTEXT)


def siglip_tokenizer() -> Any:
    """Return a fast tokenizer of words that ends each text with </s>, as SigLIP's does."""
    import tokenizers
    import transformers

    words = ["<unk>", "</s>", "a", "photo", "of", "cat", "dog", "owl"]
    vocabulary = {word: index for index, word in enumerate(words)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=CONTEXT,
        model_input_names=["input_ids"],
    )


def text_image(family: str) -> Any:
    """Return a seeded CLIPModel or SiglipModel."""
    import transformers

    text = {name: SHAPE[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    text |= {"intermediate_size": 48, "max_position_embeddings": CONTEXT}
    if family == "clip":
        text |= {"vocab_size": 56, "bos_token_id": 54, "eos_token_id": 55}
        config: Any = transformers.CLIPConfig(vision_config=SHAPE, text_config=text, projection_dim=16)
        return seeded(lambda: transformers.CLIPModel(config))
    text |= {"vocab_size": 8, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.SiglipConfig(vision_config=SHAPE, text_config=text)
    return seeded(lambda: transformers.SiglipModel(config))


def tokenizer(family: str, folder: Path) -> Any:
    """Return the tokenizer of a family; that of CLIP is written into the folder first."""
    return clip_tokenizer(folder) if family == "clip" else siglip_tokenizer()


def save(family: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Write a model with its tokenizer and its image processor into a folder, and return the model."""
    import transformers

    module = text_image(family).to(dtype)
    module.save_pretrained(folder)
    tokenizer(family, folder / "vocabulary").save_pretrained(folder)
    if family == "clip":
        sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        transformers.CLIPImageProcessorPil(**sizes).save_pretrained(folder)
    else:
        transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return module


def library_logits(module: Any, family: str, words: Any, texts: Sequence[str], pixels: Tensor) -> Tensor:
    """Return ``logits_per_image`` of the library itself, with the padding of its documentation."""
    padding = {"padding": True} if family == "clip" else {"padding": "max_length", "max_length": CONTEXT}
    return module(pixel_values=pixels, **words(list(texts), return_tensors="pt", **padding)).logits_per_image
