"""Attacks on an image classifier (Madry et al. 2018), and the restrictions that keep images within a ball or box.

    attack = Attack("li", radius=8 / 255, steps=20)
    attacked = ascend_loss(loss, images, draw_offset(images, attack, generator), attack)

Images are (N, C, H, W) in [0, 1]; as in the reference, attacked and refined ones may leave this range. The functions
are pure and do not depend on a network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from sampling import Energy, compute_input_gradient

Restriction = Callable[[Tensor, Tensor], Tensor]  # (images, images at the start of the chains) -> allowed images

SHADES = 255  # shades of a pixel above black: radii, steps and starts of attacks are given in units of 1/255
SIGN_STEP = 2  # length of a step along the gradient's sign, in shades
START = 8  # largest offset at which an attack with such steps starts, in shades


def restrict_to_bounds(x: Tensor, start: Tensor) -> Tensor:
    """Return the images clipped to [0, 1]; their start does not matter."""
    return x.clamp(0, 1)


def restrict_to_ball(x: Tensor, centre: Tensor, *, radius: float, norm: str = "li") -> Tensor:
    """Return the images projected onto a ball around `centre`: L∞ ("li"), or L2 of each image ("l2")."""
    if norm == "li":
        return x.clamp(centre - radius, centre + radius)
    offset = x - centre
    length = offset.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
    return centre + offset * (radius / length).clamp(max=1)


def restrict_to_lower_half(x: Tensor, start: Tensor) -> Tensor:
    """Return the images with the upper half of `start`, clipped to [0, 1]."""
    half = x.shape[2] // 2
    return torch.cat([start[:, :, :half], x[:, :, half:]], dim=2).clamp(0, 1)


@dataclasses.dataclass(frozen=True)
class Attack:
    """Projected gradient ascent on a classifier's loss (Madry et al. 2018), within a ball around each image.

    norm: of the ball, "li" or "l2". radius: of the ball, for images in [0, 1]. steps: number of gradient steps; 0: no
    attack. draws: number of noise draws over which the gradient through a noisy classifier is averaged; 0: the attack
    ignores the noisy part. per_step: the ball lies around the image before each step, so that the sum of all steps has
    no limit, and steps follow the gradient's sign, as in the L2 attack of the reference.
    """

    norm: str
    radius: float
    steps: int
    draws: int = 0
    per_step: bool = False

    @property
    def has_sign_steps(self) -> bool:
        """Whether a step moves each pixel by the same amount, along the sign of the gradient."""
        return self.norm == "li" or self.per_step

    @property
    def step_size(self) -> float:
        """The step size: of each pixel 2/255, as in the reference, or the L2 length of a step, 2.5 radii / steps."""
        return SIGN_STEP / SHADES if self.has_sign_steps else 2.5 * self.radius / max(self.steps, 1)

    def __str__(self) -> str:
        if not self.steps:
            return "none"
        ball = f"{'L∞' if self.norm == 'li' else 'L2'} ball of {self.radius * SHADES:g}/{SHADES}"
        limit = f"each step but not their sum within an {ball}" if self.per_step else ball
        start = f"within ±{START}/{SHADES}" if self.has_sign_steps else "in the ball"
        steps = f"{self.steps} steps of {self.step_size * SHADES:.3g}/{SHADES}"
        scope = f"through the refinement, mean of {self.draws} draws" if self.draws else "not through the refinement"
        return f"PGD, {limit}, random start {start}, {steps}, gradient {scope}"


def ascend_loss(loss: Energy, images: Tensor, offset: Tensor, attack: Attack) -> Tensor:
    """Return attacked images (N, C, H, W), moved by gradient ascent on `loss` within their balls.

    loss: images -> the loss of each, (N,). offset: added to the images before the first step, see `draw_offset`.
    """
    x = images
    for k in range(attack.steps):
        start = x + offset if k == 0 else x
        gradient = torch.stack([compute_input_gradient(loss, start) for _ in range(max(attack.draws, 1))]).mean(0)
        moved = start + attack.step_size * find_direction(gradient, "li" if attack.has_sign_steps else "l2")
        x = restrict_to_ball(moved, x if attack.per_step else images, radius=attack.radius, norm=attack.norm)
    return x


def draw_offset(images: Tensor, attack: Attack, generator: torch.Generator) -> Tensor:
    """Draw where an attack starts, as offsets shaped like the images.

    Where steps follow the gradient's sign, a value is one of −8 … 8 shades whatever the radius, as in the reference;
    else the offset is uniformly distributed in the attack's ball.
    """
    device = images.device
    if attack.has_sign_steps:
        return torch.randint(-START, START + 1, images.shape, generator=generator, device=device) / SHADES
    normal = torch.randn(images.shape, generator=generator, device=device)
    reach = torch.rand(len(images), 1, 1, 1, generator=generator, device=device)
    return attack.radius * reach ** (1 / images[0].numel()) * find_direction(normal, "l2")


def find_direction(gradient: Tensor, norm: str) -> Tensor:
    """Return the direction of steepest ascent: the sign of the gradient ("li"), or the gradient with norm 1 ("l2")."""
    if norm == "li":
        return gradient.sign()
    return gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
