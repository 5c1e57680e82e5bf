"""What one training step is made of: the objectives and the reference's optimizer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

OBJECTIVES = ("cd", "logsumexp", "softplus")


def contrastive_loss(
    e_pos: Tensor, e_neg: Tensor, *, objective: str = "cd", ml_coeff: float = 1.0, l2_coeff: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return (likelihood term, regulariser) of energies (N,) of data and of negatives, both scalars.

    cd: ml_coeff · (mean E⁺ − mean E⁻), contrastive divergence (paper, equation 2).
    logsumexp: the negatives weighted by softmax(−E⁻), through which no gradient flows.
    softplus: ml_coeff · softplus(E⁺ − E⁻). The regulariser is l2_coeff · (mean E⁺² + mean E⁻²).
    """
    if objective == "cd":
        likelihood = e_pos.mean() - e_neg.mean()
    elif objective == "logsumexp":
        weights = (-(e_neg - e_neg.min())).exp().detach()
        likelihood = e_pos.mean() - (weights / (weights.sum() + 1e-4) * e_neg).sum()
    elif objective == "softplus":
        likelihood = F.softplus(e_pos - e_neg).mean()
    else:
        raise ValueError(f"objective is {objective!r}, must be one of {OBJECTIVES}")
    return ml_coeff * likelihood, l2_coeff * (e_pos.square().mean() + e_neg.square().mean())


class ClippedAdam(torch.optim.Optimizer):
    """Adam as TensorFlow 1 has it, each gradient first clipped by its own history.

    A gradient is clipped elementwise to ±(3·sqrt(v/(1 − β2ᵗ)) + 0.1), v the second moment before this step. The step
    is p −= lr·sqrt(1 − β2ᵗ)/(1 − β1ᵗ) · m/(sqrt(v) + eps), with eps outside the bias correction ("epsilon hat").
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.0, 0.999),
        eps: float = 1e-8,
    ):
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"m": torch.zeros_like(parameter), "v": torch.zeros_like(parameter)}
            group.setdefault("t", 0)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            group["t"] += 1
            (beta1, beta2), t = group["betas"], group["t"]
            rate = group["lr"] * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
            parameters = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in parameters]
            first, second = ([self.state[p][key] for p in parameters] for key in ("m", "v"))

            bound = torch._foreach_sqrt(torch._foreach_div(second, 1 - beta2**t))
            torch._foreach_mul_(bound, 3.0)
            torch._foreach_add_(bound, 0.1)
            clipped = torch._foreach_minimum(gradients, bound)
            torch._foreach_neg_(bound)
            torch._foreach_maximum_(clipped, bound)

            torch._foreach_lerp_(first, clipped, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, clipped, clipped, 1 - beta2)
            denominator = torch._foreach_sqrt(second)
            torch._foreach_add_(denominator, group["eps"])
            torch._foreach_addcdiv_(parameters, first, denominator, -rate)
