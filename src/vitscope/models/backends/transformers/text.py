"""transformers: the text tower of CLIP and SigLIP with its tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from jaxtyping import Float
from torch import Tensor, nn

from vitscope.errors import CallError, ModelUnavailableError
from vitscope.models.backends.foreign_errors import foreign_errors
from vitscope.models.backends.library_logging import quiet
from vitscope.models.backends.transformers.checkpoint import Checkpoint, fill
from vitscope.models.backends.transformers.families import TEXT_FAMILIES, TextFamily
from vitscope.models.checkpoints.weights_file import read_weights
from vitscope.models.evaluation import eager, evaluating
from vitscope.models.outputs import Output
from vitscope.models.text import TextLogits
from vitscope.validation import require_finite_tensor, short_repr

# Without one of these files, transformers builds a tokenizer with an empty vocabulary.
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
TOKENIZER_FILES = (*VOCABULARIES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

BATCH = 64  # texts per forward pass


@dataclass(frozen=True, eq=False)
class TextTower:
    """The modules of a text-image model that embed a text and compare it with the features of an image.

    Attributes:
        encoder: the text model.
        projection: layer from the text model's output to the shared channels; None for SigLIP.
        visual_projection: layer from the image's features to the shared channels; None for SigLIP.
        scale: logarithm of the temperature.
        bias: number added to every logit; None for CLIP.
    """

    encoder: Any
    projection: Any
    visual_projection: Any
    scale: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, module: Any) -> "TextTower":
        """Return the text tower of a CLIPModel or SiglipModel."""
        return cls(
            module.text_model,
            getattr(module, "text_projection", None),
            getattr(module, "visual_projection", None),
            module.logit_scale,
            getattr(module, "logit_bias", None),
        )

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.encoder.parameters()).device

    @property
    def layers(self) -> nn.ModuleList:
        """The modules of the tower."""
        layers = (self.encoder, self.projection, self.visual_projection)
        return nn.ModuleList(layer for layer in layers if layer is not None)

    def logits(self, texts: Sequence[str], tokens: Sequence[dict[str, Tensor]]) -> TextLogits:
        """Return the logits of texts, given their tokens in batches."""
        vectors = F.normalize(_upcast(torch.cat([self._embed(batch) for batch in tokens])), dim=-1)
        vectors = vectors * _upcast(self.scale).exp().to(vectors.device)
        bias = None if self.bias is None else _upcast(self.bias).to(vectors.device).expand(len(texts)).clone()
        matrix = None
        if self.visual_projection is not None:
            # The outputs for the unit vectors are the layer's matrix, whatever adapters it has.
            weight = next(self.visual_projection.parameters())
            units = torch.eye(self.visual_projection.in_features, dtype=weight.dtype, device=weight.device)
            matrix = self.visual_projection(units).T.contiguous()
        return TextLogits(tuple(texts), vectors, bias, matrix)

    def _embed(self, tokens: dict[str, Tensor]) -> Float[Tensor, "text channel"]:
        pooled = self.encoder(**tokens).pooler_output
        return pooled if self.projection is None else self.projection(pooled)


@dataclass(frozen=True)
class TextCheckpoint:
    """The files from which a text tower is loaded when it is first used.

    Attributes:
        config: configuration of the whole model.
        source: local folder or hub id.
        local_only: whether the hub's client must use its cache alone.
        weights: weights file that is used instead of that of ``source``; None to use that.
        dtype: precision of the weights; None for that of the checkpoint.
    """

    config: Any
    source: str
    local_only: bool
    weights: str | None
    dtype: torch.dtype | None

    def load(self, name: str, module_class: str) -> TextTower:
        """Return the text tower.

        Raises:
            ModelUnavailableError: the files do not exist any more, or do not fill the whole model.
        """
        for path in (self.source, self.weights):
            _check_exists(path, name)
        state = None if self.weights is None else read_weights(self.weights)
        checkpoint = Checkpoint(self.weights or name, self.source, self.local_only, state)
        with quiet(), torch.device("cpu"):  # whatever the default device is
            module = fill(getattr(transformers, module_class), self.config, checkpoint, dtype=self.dtype)
        return TextTower.of(module.eval())


@dataclass(eq=False)
class Texts:
    """The text tower of a model with its tokenizer; both are loaded when they are first used.

    Attributes:
        name: name of the model in messages.
        family: facts of the model's family.
        source: folder or hub id of the tokenizer; empty if the model does not come from a checkpoint.
        local_only: whether the hub's client must use its cache alone.
        checkpoint: files of the text tower; None for a live model.
        tower: the text tower; None if it is not loaded yet.
        tokenizer: the tokenizer; None if it is not loaded yet.
    """

    name: str
    family: TextFamily
    source: str
    local_only: bool
    checkpoint: TextCheckpoint | None = None
    tower: TextTower | None = None
    tokenizer: Any = None

    @property
    def meaning(self) -> Output:
        """The meaning of the logits."""
        return self.family.meaning

    def with_tokenizer(self, tokenizer: Any) -> "Texts":
        """Return the text tower with another tokenizer.

        Args:
            tokenizer: a tokenizer or processor of transformers, or the folder of one.

        Raises:
            CallError: it is none of these.
            ModelUnavailableError: the folder contains no tokenizer.
        """
        if isinstance(tokenizer, str | Path):
            if not Path(tokenizer).is_dir():
                raise CallError(f"tokenizer is {short_repr(str(tokenizer))}, which is not a folder: pass a saved one")
            tokenizer = _load_tokenizer(str(tokenizer), str(tokenizer), local_only=True)
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
            raise CallError(
                f"tokenizer is a {type(tokenizer).__name__}: pass a tokenizer of transformers or the folder of one"
            )
        return replace(self, tokenizer=tokenizer)

    def __call__(self, texts: Sequence[str], device: torch.device) -> TextLogits:
        """Return the logits of texts; the vectors are computed in evaluation mode, without a graph.

        Args:
            texts: the texts.
            device: device on which the tower runs, unless it belongs to a live model.

        Raises:
            CallError: a text is too long, or the tokenizer belongs to another model.
            ModelUnavailableError: there is no tokenizer, or the text tower cannot be loaded.
        """
        with torch.inference_mode(False), torch.no_grad():
            tokenizer = self._tokenizer()
            tower = self.tower
            if tower is None:
                assert self.checkpoint is not None
                tower = self.checkpoint.load(self.name, self.family.module_class)
                tower.layers.to(device)
                self.tower = tower
            tokens = self._tokens(tokenizer, texts, tower)
            full_precision = torch.autocast(tower.device.type, enabled=False)
            with evaluating(tower.layers), eager(tower.layers), full_precision:
                result = tower.logits(texts, tokens)
        require_finite_tensor(result.vectors, f"the text vectors of {self.name}")
        return result

    def _tokenizer(self) -> Any:
        """Return the tokenizer, which is loaded on first use."""
        if self.tokenizer is None:
            if not self.source:
                raise ModelUnavailableError(
                    f"{self.name} has no tokenizer, because it does not come from a checkpoint: pass tokenizer= to "
                    "vitscope.load"
                )
            self.tokenizer = _load_tokenizer(self.name, self.source, local_only=self.local_only)
        return self.tokenizer

    def _tokens(self, tokenizer: Any, texts: Sequence[str], tower: TextTower) -> list[dict[str, Tensor]]:
        """Return the tokens of the texts in batches, padded as the model was trained."""
        config: Any = tower.encoder.config
        limit = min(config.max_position_embeddings, tokenizer.model_max_length)
        with quiet(), foreign_errors(f"{self.name} cannot read the texts: its tokenizer"):
            rows = tokenizer(list(texts))["input_ids"]
            for text, row in zip(texts, rows, strict=True):
                self._check_tokens(text, row, config, limit, tokenizer.eos_token_id)
            options = {"padding": self.family.padding} if len({len(row) for row in rows} | {limit}) > 1 else {}
            encoding = tokenizer(list(texts), max_length=limit, **options)
        names = [name for name in ("input_ids", "attention_mask") if name in encoding]
        return [
            {
                name: torch.tensor(encoding[name][start : start + BATCH], dtype=torch.int64, device=tower.device)
                for name in names
            }
            for start in range(0, len(texts), BATCH)
        ]

    def _check_tokens(self, text: str, row: Sequence[int], config: Any, limit: int, end: int | None) -> None:
        """Refuse a text that is too long for the tower, and a tokenizer that belongs to another model."""
        if len(row) > limit:
            raise CallError(
                f"the text {short_repr(text)} has {len(row)} tokens, and {self.name} reads at most {limit}: shorten it"
            )
        reason = ""
        if max(row, default=config.vocab_size) >= config.vocab_size:
            reason = f"returns other tokens than the {config.vocab_size} of its text tower"
        elif self.family.reads_end:
            # In old checkpoints, whose configuration states 2, the end is the token with the largest number.
            legacy = config.eos_token_id == 2
            position = max(row) if legacy else config.eos_token_id
            if position not in row or (legacy and end is not None and position != end):
                reason = "does not mark the end of a text as its text tower expects"
        if reason:
            raise CallError(f"the tokenizer of {self.name} {reason}: pass the model's own as tokenizer=")


def live_texts(module: Any, name: str, source: str) -> Texts | None:
    """Return the text tower of a live CLIPModel or SiglipModel; None for every other model."""
    names = {cls.__name__ for cls in type(module).__mro__}
    family = next((family for family in TEXT_FAMILIES.values() if family.module_class in names), None)
    if family is None or not _has_image_vector(module.config):
        return None
    return Texts(name, family, source, local_only=True, tower=TextTower.of(module))


def checkpoint_texts(
    config: Any, name: str, source: str, *, local_only: bool, weights: str | Path | None, dtype: torch.dtype | None
) -> Texts | None:
    """Return the text tower of a checkpoint of CLIP or SigLIP; None for every other checkpoint.

    Args:
        config: configuration of the checkpoint.
        name: name of the model in messages.
        source: local folder or hub id; empty if there is only a file of weights.
        local_only: whether the hub's client must use its cache alone.
        weights: weights file that is used instead of that of ``source``.
        dtype: precision of the weights; None for that of the checkpoint.
    """
    family = TEXT_FAMILIES.get(config.model_type)
    if family is None or family.module_class not in (config.architectures or [family.module_class]):
        return None
    if not _has_image_vector(config):
        return None
    # The working directory may change before the first use.
    source = str(Path(source).resolve()) if source and Path(source).exists() else source
    file = None if weights is None else str(Path(weights).resolve())
    checkpoint = TextCheckpoint(config, source, local_only, file, dtype)
    return Texts(name, family, source, local_only, checkpoint)


def _check_exists(path: str | None, name: str) -> None:
    """Refuse a file or folder that was removed since the model was loaded from it."""
    if path is not None and Path(path).is_absolute() and not Path(path).exists():
        raise ModelUnavailableError(f"{name} cannot read texts: {path} does not exist any more: load the model again")


def _has_image_vector(config: Any) -> bool:
    """Return whether the vision tower has the pooling layer that SigLIP compares with texts."""
    return bool(getattr(config.vision_config, "vision_use_head", True))


def _load_tokenizer(name: str, source: str, *, local_only: bool) -> Any:
    """Return the tokenizer of a folder or hub id; code that comes with it never runs.

    Raises:
        ModelUnavailableError: there is none, or its files are damaged.
    """
    _check_exists(source, name)
    folder = Path(source)
    if folder.is_dir():
        for file in TOKENIZER_FILES:
            if (folder / file).exists() and not (folder / file).is_file():
                raise ModelUnavailableError(f"{name} cannot read texts: {file} is not a regular file: replace it")
    checkpoint = Checkpoint(name, source, local_only)
    if not any(checkpoint.file(file) for file in VOCABULARIES):
        raise ModelUnavailableError(
            f"{name} has no tokenizer ({', '.join(VOCABULARIES)} are missing): save it there with the tokenizer's "
            "save_pretrained(), or pass tokenizer= to vitscope.load"
        )
    with quiet(), foreign_errors(f"{name} cannot read texts: loading its tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(source, local_files_only=local_only, trust_remote_code=False)


def _upcast(tensor: Tensor) -> Tensor:
    """Return the values in float32 at least, without a graph."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
