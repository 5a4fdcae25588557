"""The optimizer Muon in float32 for the matrices of a transformer's blocks, with AdamW for all other weights."""

from typing import Any

import torch
from torch import Tensor

STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Muon for groups of matrices, and AdamW for all other groups.

    Muon moves the singular values of the momentum to about 1 by Newton–Schulz iterations.

    torch's own Muon works in bfloat16, which is twenty times slower on processors that do not support it. Groups with
    ``matrices`` set take Muon's steps. Each step is as large as an AdamW step would be, so learning rates are
    comparable.

    Reference: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "matrices": False, "betas": betas, "eps": 1e-8})
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            update = self._muon_step if group["matrices"] else self._adam_step
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    update(parameter, parameter.grad, group)

    def _muon_step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
        average.lerp_(gradient, 1 - self.momentum)
        update = orthogonalize(gradient.lerp(average, self.momentum))
        parameter.add_(update, alpha=-float(group["lr"]) * 0.2 * max(parameter.shape) ** 0.5)

    def _adam_step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state |= {"step": torch.zeros((), dtype=torch.float32, device="cpu"), "mean": torch.zeros_like(parameter)}
            state["square"] = torch.zeros_like(parameter)
        first, second = group["betas"]
        state["step"] += 1
        count = float(state["step"])
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        scale = (state["square"] / (1 - second**count)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["mean"], scale, value=-float(group["lr"]) / (1 - first**count))


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return the matrix with its singular values moved to about 1."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
