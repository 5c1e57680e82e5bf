"""Adam as TensorFlow 1 and the reference have it."""

from __future__ import annotations

from collections.abc import Iterable

import torch


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
