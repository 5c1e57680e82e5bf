"""The replay buffer and the optimizer, both as in the reference."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ebm.support.pixels import dequantise

REPLAY_SIZE = 10_000  # images that a training run's buffer holds


class ReplayBuffer:
    """A ring buffer of the chains' latest end points, uint8 (capacity, C, H, W) on the device (paper, section 3.3)."""

    def __init__(self, capacity: int, image_shape: tuple[int, ...], device: torch.device | str = "cpu"):
        self.images = torch.zeros((capacity, *image_shape), dtype=torch.uint8, device=device)
        self.size = 0
        self.position = 0

    def __len__(self) -> int:
        return self.size

    def push(self, images: Tensor, rescale: float = 1.0) -> None:
        """Store images (n, C, H, W) in [0, rescale] as bytes, in place of the oldest ones."""
        capacity = len(self.images)
        images = images[-capacity:]
        stored = (images.clamp(0, rescale) * (255 / rescale)).to(torch.uint8)
        head = min(len(stored), capacity - self.position)
        self.images[self.position : self.position + head] = stored[:head]
        self.images[: len(stored) - head] = stored[head:]
        self.position = (self.position + len(stored)) % capacity
        self.size = min(self.size + len(stored), capacity)

    def sample(self, n: int, generator: torch.Generator | None, rescale: float = 1.0) -> Tensor:
        """Return n random stored images, drawn with replacement, as floats in [0, rescale]."""
        index = torch.randint(self.size, (n,), generator=generator, device=self.images.device)
        return dequantise(self.images[index], generator, rescale)

    def state_dict(self) -> dict[str, Any]:
        """Return the stored images and the position that is written next."""
        return {"images": self.images[: self.size].cpu(), "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the images of a saved buffer; if they are more than the capacity, keep the newest."""
        images, position, capacity = state["images"], state["position"], len(self.images)
        if len(images) > capacity:
            images = torch.cat([images[position:], images[:position]])[len(images) - capacity :]
            position = 0
        self.size = len(images)
        self.position = position if self.size == len(self.images) else self.size
        self.images[: self.size] = images.to(self.images.device)


class ClippedAdam:
    """Adam as in TensorFlow 1, with each gradient clipped by its own history.

    A gradient is clipped elementwise to ±(3·sqrt(v/(1 − β2ᵗ)) + 0.1), v the second moment before this step. The step
    is p −= lr·sqrt(1 − β2ᵗ)/(1 − β1ᵗ) · m/(sqrt(v) + eps), with eps outside the bias correction ("epsilon hat").
    clip_gradients: without it, gradients are taken as they are, which is TensorFlow's own Adam.

    It has the groups and the states of a torch.optim.Optimizer. It does not inherit from that class, which loads
    torch's compiler and would add two seconds to every start.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.0, 0.999),
        eps: float = 1e-8,
        clip_gradients: bool = True,
    ):
        self.clip_gradients = clip_gradients
        parameters = list(parameters)
        self.param_groups: list[dict[str, Any]] = [{"params": parameters, "lr": lr, "betas": betas, "eps": eps, "t": 0}]
        self.state = {p: {"m": torch.zeros_like(p), "v": torch.zeros_like(p)} for p in parameters}

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.state:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return settings, step count and moments; a parameter is identified by its number."""
        (group,) = self.param_groups
        return {
            "state": dict(enumerate(self.state.values())),
            "param_groups": [group | {"params": list(range(len(self.state)))}],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned, onto the devices of the parameters.

        Raises ValueError if the moments do not have the shapes of the parameters.
        """
        moments: list[dict[str, Tensor]] = [state["state"][number] for number in sorted(state["state"])]
        if [m["m"].shape for m in moments] != [parameter.shape for parameter in self.state]:
            raise ValueError(f"moments of {len(moments)} other parameters than these {len(self.state)}")
        for parameter, pair in zip(self.state, moments, strict=True):
            self.state[parameter] = {name: moment.to(parameter.device, copy=True) for name, moment in pair.items()}
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

            if self.clip_gradients:
                bound = torch._foreach_sqrt(torch._foreach_div(second, 1 - beta2**t))
                torch._foreach_mul_(bound, 3.0)
                torch._foreach_add_(bound, 0.1)
                gradients = list(torch._foreach_minimum(gradients, bound))
                torch._foreach_neg_(bound)
                torch._foreach_maximum_(gradients, bound)

            torch._foreach_lerp_(first, gradients, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
            denominator = torch._foreach_sqrt(second)
            torch._foreach_add_(denominator, group["eps"])
            torch._foreach_addcdiv_(parameters, first, denominator, -rate)
