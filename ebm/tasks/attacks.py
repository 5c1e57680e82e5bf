"""Attacks on an image classifier (Madry et al. 2018), and the restrictions that keep images within a ball or box.

    attacked = ascend_loss(loss, images, Attack("li", radius=8 / 255, steps=20), generator)

Images are (N, C, H, W) in [0, 1]. The functions are pure and do not depend on a network.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from sampling import Energy, compute_input_gradient

Restriction = Callable[[Tensor, Tensor], Tensor]  # (images, images at the start of the chains) -> allowed images


def restrict_to_bounds(x: Tensor, start: Tensor) -> Tensor:
    """Return the images clipped to [0, 1]; their start does not matter."""
    return x.clamp(0, 1)


def restrict_to_ball(x: Tensor, centre: Tensor, *, radius: float, norm: str = "li") -> Tensor:
    """Return the images projected onto a ball around `centre` and clipped to [0, 1].

    norm: that of the ball, L∞ ("li") or L2 of each image ("l2").
    """
    offset = x - centre
    if norm == "li":
        offset = offset.clamp(-radius, radius)
    else:
        length = offset.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
        offset = offset * (radius / length).clamp(max=1)
    return (centre + offset).clamp(0, 1)  # images lie in [0, 1], so clipping brings them nearer to the centre


def restrict_to_lower_half(x: Tensor, start: Tensor) -> Tensor:
    """Return the images with the upper half of `start`, bit for bit, and the lower half clipped to [0, 1]."""
    half = x.shape[2] // 2
    return torch.cat([start[:, :, :half], x[:, :, half:].clamp(0, 1)], dim=2)


@dataclasses.dataclass(frozen=True)
class Attack:
    """Projected gradient ascent on a classifier's loss (Madry et al. 2018), within a ball around each image.

    norm: of the ball, "li" or "l2". radius: of the ball, for images in [0, 1]. steps: number of gradient steps; 0: no
    attack. draws: number of noise draws over which the gradient through a noisy classifier is averaged; 0: the attack
    ignores the noisy part.
    """

    norm: str
    radius: float
    steps: int
    draws: int = 0

    @property
    def step_size(self) -> float:
        """The step size. L∞: 2/255 as in the reference, but at most a quarter of the radius. L2: 2.5 radii / steps."""
        return min(2 / 255, self.radius / 4) if self.norm == "li" else 2.5 * self.radius / max(self.steps, 1)

    def __str__(self) -> str:
        if not self.steps:
            return "none"
        ball = f"{'L∞' if self.norm == 'li' else 'L2'} ball of {self.radius * 255:g}/255"
        steps = f"{self.steps} steps of {self.step_size * 255:.3g}/255"
        scope = f"through the refinement, mean of {self.draws} draws" if self.draws else "not through the refinement"
        return f"PGD, {ball}, random start, {steps}, gradient {scope}"


def ascend_loss(loss: Energy, images: Tensor, attack: Attack, generator: torch.Generator) -> Tensor:
    """Return attacked images (N, C, H, W), moved by gradient ascent on `loss` within their balls and [0, 1].

    loss: images -> the loss of each, (N,). The start is drawn at random from the ball.
    """
    project = functools.partial(restrict_to_ball, centre=images, radius=attack.radius, norm=attack.norm)
    x = project(images + draw_offset(images, attack, generator))
    for _ in range(attack.steps):
        gradient = torch.stack([compute_input_gradient(loss, x) for _ in range(max(attack.draws, 1))]).mean(0)
        x = project(x + attack.step_size * find_direction(gradient, attack.norm))
    return x


def draw_offset(images: Tensor, attack: Attack, generator: torch.Generator) -> Tensor:
    """Draw offsets shaped like the images from the uniform distribution on the attack's ball."""
    if attack.norm == "li":
        uniform = torch.rand(images.shape, generator=generator, device=images.device)
        return attack.radius * (2 * uniform - 1)
    normal = torch.randn(images.shape, generator=generator, device=images.device)
    reach = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device)
    return attack.radius * reach ** (1 / images[0].numel()) * find_direction(normal, "l2")


def find_direction(gradient: Tensor, norm: str) -> Tensor:
    """Return the direction of steepest ascent: the sign of the gradient ("li"), or the gradient with norm 1 ("l2")."""
    if norm == "li":
        return gradient.sign()
    return gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
