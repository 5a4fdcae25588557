"""A classifier that reads a Swin through learned CLS tokens, one per stage, which enter every window."""

import json
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vitscope.errors import CallError, WorkError
from vitscope.files import atomic_write
from vitscope.models.vision_model import VisionModel
from vitscope.models.window_reader import WindowReader
from vitscope.tracing.capture import as_vision_model
from vitscope.typing import Pixels
from vitscope.window_tokens.window_cls import WindowCls, window_cls


class WindowHead(WindowReader):
    """Learnable CLS tokens in the windows of a frozen Swin, and a small head that reads only these tokens.

    In each block the stage's token enters every window, attends to itself and the window through the block's own
    weights, and adds the output to itself. The mean over windows and blocks of a stage is the stage's summary; a
    LayerNorm and one linear layer turn the summaries of all stages into logits. Tokens of the image do not attend to
    the CLS token, so the backbone's output is unchanged. The backbone's weights get no gradient.

    ``parameters()`` and ``state_dict()`` are those of the tokens and the head alone.

    Args:
        model: a Swin (version 1) of transformers, timm or torchvision; from :func:`vitscope.load`, or a live module.
        num_classes: number of classes.

    Examples:
        >>> import torch, vitscope as vs
        >>> head = vs.WindowHead(vs.load("swin-nano"), num_classes=3)
        >>> head(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 3])
    """

    def __init__(self, model: VisionModel | nn.Module, num_classes: int) -> None:
        backbone = as_vision_model(model)
        super().__init__(backbone, num_classes)
        self._backbone = (backbone,)  # in a tuple: its weights are not this module's

    @property
    def backbone(self) -> VisionModel:
        """The frozen Swin that the head reads."""
        return self._backbone[0]

    def forward(self, pixels: Pixels) -> Float[Tensor, "batch label"]:
        """Return the logits of preprocessed images; gradients flow to the tokens and the head.

        Args:
            pixels: preprocessed images, (batch, channel, height, width).

        Raises:
            CallError: head and backbone differ in device or dtype.
        """
        weight, backbone = self.head.weight, self.backbone
        if (weight.device, weight.dtype) != (backbone.device, backbone.dtype):
            raise CallError(
                f"the head is {weight.dtype} on {weight.device}, its backbone {backbone.dtype} on {backbone.device}: "
                "move head.backbone.module as well"
            )
        return self.read(self.backbone, pixels)

    def explain(self, images: Any) -> WindowCls:
        """Return the attention of the learned tokens in every block.

        Args:
            images: see :func:`vitscope.capture`.
        """
        return window_cls(self.backbone, images, tokens=[token.detach() for token in self.tokens])

    def save(self, path: str | Path) -> Path:
        """Save the tokens and the head as safetensors, atomically, and return the path.

        Args:
            path: file to write; an existing file is replaced.

        Raises:
            SaveError: the file cannot be written; an existing file at ``path`` is unchanged.
        """
        path = Path(path)
        metadata = {"kind": "vitscope window head", "model": self.backbone.name}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        with atomic_write(path) as temporary:
            try:
                save_file(tensors, temporary, {"about": json.dumps(metadata)})
            except SafetensorError as error:
                raise OSError(str(error)) from error
        return path

    @classmethod
    def load(cls, path: str | Path, model: VisionModel | nn.Module) -> "WindowHead":
        """Load a head that :meth:`save` wrote, for a backbone of the same shape.

        Args:
            path: file to read.
            model: the backbone.

        Raises:
            CallError: the file does not exist, or belongs to a backbone of another shape.
            WorkError: the file is not a saved head.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = json.loads((file.metadata() or {})["about"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            num_classes = len(tensors["head.weight"])
        except FileNotFoundError:
            raise CallError(f"{path} does not exist") from None
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise WorkError(f"{path} is not a saved window head: {error}") from None
        head = cls(model, num_classes)
        expected_shapes = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes != expected_shapes:
            widths = [len(tensor) for name, tensor in tensors.items() if name.startswith("tokens.")]
            raise CallError(
                f"{path} was saved for {metadata['model']} with stages {widths} channels wide; {head.backbone.name} "
                f"has {[len(token) for token in head.tokens]}"
            )
        head.load_state_dict(tensors)
        return head
