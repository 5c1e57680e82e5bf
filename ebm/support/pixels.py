"""Conversion of images between bytes and floats."""

from __future__ import annotations

import torch
from torch import Tensor


def dequantise(stored: Tensor, generator: torch.Generator | None, rescale: float) -> Tensor:
    """Return images of values in [0, 255] as floats in [0, rescale], with noise: (value + U(0, 1))/256·rescale."""
    noise = torch.rand(stored.shape, generator=generator, device=stored.device)
    return (stored + noise).mul_(rescale / 256)


def to_bytes(images: Tensor) -> Tensor:
    """Return images in [0, 1] as uint8, clip(256·x, 0, 255), as the reference passes them to Inception."""
    return (images * 256).clamp(0, 255).to(torch.uint8)
