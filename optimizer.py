"""Adam as TensorFlow 1 and the reference have it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class ClippedAdam:
    """Adam as TensorFlow 1 has it, each gradient first clipped by its own history.

    A gradient is clipped elementwise to ±(3·sqrt(v/(1 − β2ᵗ)) + 0.1), v the second moment before this step. The step
    is p −= lr·sqrt(1 − β2ᵗ)/(1 − β1ᵗ) · m/(sqrt(v) + eps), with eps outside the bias correction ("epsilon hat").

    It has the groups and the states of a torch.optim.Optimizer, but not that base class: that one loads torch's
    compiler, two seconds of every start.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.0, 0.999),
        eps: float = 1e-8,
    ):
        parameters = list(parameters)
        self.param_groups: list[dict[str, Any]] = [{"params": parameters, "lr": lr, "betas": betas, "eps": eps, "t": 0}]
        self.state = {p: {"m": torch.zeros_like(p), "v": torch.zeros_like(p)} for p in parameters}

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.state:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return settings, step count and moments, the parameters by number."""
        (group,) = self.param_groups
        return {
            "state": dict(enumerate(self.state.values())),
            "param_groups": [group | {"params": list(range(len(self.state)))}],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, onto the parameters' devices; ValueError for other parameters."""
        moments: list[dict[str, Tensor]] = [state["state"][number] for number in sorted(state["state"])]
        if [m["m"].shape for m in moments] != [parameter.shape for parameter in self.state]:
            raise ValueError(f"moments of {len(moments)} other parameters than these {len(self.state)}")
        for parameter, own in zip(self.state, moments, strict=True):
            self.state[parameter] = {name: moment.to(parameter.device, copy=True) for name, moment in own.items()}
        self.param_groups[0] |= {name: value for name, value in state["param_groups"][0].items() if name != "params"}

    @torch.no_grad()
    def step(self) -> None:
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
