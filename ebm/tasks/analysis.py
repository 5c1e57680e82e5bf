"""Parts of the sandbox tasks: corruption and conversion of images, nearest neighbours, directions of change."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data import Dataset
from ebm.support.errors import UsageError
from ebm.support.progress import SHORT, Progress
from sampling import Energy


def add_salt_and_pepper(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images with salt-and-pepper noise: 5 % of the pixels are 0.1 and another 5 % are 0.9, in all channels."""
    chance = torch.rand(len(images), 1, *images.shape[2:], generator=generator, device=images.device)
    pepper = torch.where(chance < 0.05, 0.1, images)
    return torch.where((chance >= 0.05) & (chance < 0.1), 0.9, pepper)


def average_with_next(images: Tensor) -> Tensor:
    """Return the mean of each image (N, C, H, W) and the next one, for the last image and the first."""
    return (images + images.roll(-1, 0)) / 2


def fit_images(images: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
    """Return images (N, c, h, w) converted to the shape (C, H, W).

    Colour becomes grey by luminance, grey becomes colour by repetition; the size changes by bilinear interpolation.
    """
    channels, *size = image_shape
    if channels == 1 and images.shape[1] == 3:
        images = (images * images.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    if list(images.shape[2:]) != size:
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
    return images.expand(-1, channels, -1, -1)


def read_images(dataset: Dataset, index: Tensor) -> Tensor:
    """Return the images (n, C, H, W) of an index (n,) in [0, 1], without dequantisation noise."""
    return dataset.raw(index).float().div(255)


def find_neighbours(queries: Tensor, dataset: Dataset, count: int, *, block: int = 1024) -> tuple[Tensor, Tensor]:
    """Find the `count` nearest images of a data set in L2; return their distances, ascending, and indices, (Q, count).

    queries: (Q, C, H, W). The search covers all images, `block` at a time: memory holds that many images and Q·block
    distances. Distances are sums of squares, because the faster |a|² − 2ab + |b|² loses digits.
    """
    flat = queries.flatten(1)
    distances = flat.new_zeros(len(flat), 0)
    indices = torch.zeros_like(distances, dtype=torch.long)
    with Progress(len(dataset), what="search") as progress:
        for places in torch.arange(len(dataset), device=flat.device).split(block):
            block_distances = torch.cdist(
                flat, read_images(dataset, places).flatten(1), compute_mode="donot_use_mm_for_euclid_dist"
            )
            distances, order = torch.cat([distances, block_distances], 1).sort(1)
            indices = torch.cat([indices, places.expand(len(flat), -1)], 1).gather(1, order)[:, :count]
            distances = distances[:, :count]
            progress.update(int(places[-1]) + 1)
    return distances, indices


LARGEST_MATRIX = 4096  # largest number of rows for which a whole Hessian is computed: that of 64x64 pixels


def find_hessian_directions(
    energy: Energy, image: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the smallest eigenvalues of the energy's Hessian at an image, and their eigenvectors.

    image: (C, H, W). The eigenvalues (count,) ascend, of which the first ones are usually negative; the eigenvectors
    (count, C, H, W) have length 1 and an arbitrary sign. Lanczos iteration on Hessian-vector products takes about a
    hundred backward passes at 64x64; the full matrix, which takes 4,096, is computed where the iteration does not
    converge, as where the smallest eigenvalues are 0. Raises UsageError if the Hessian is zero.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    x = image[None].detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)

    def product(vector: np.ndarray) -> np.ndarray:
        direction = torch.from_numpy(vector.astype(np.float32)).to(x.device).view_as(x)
        (result,) = torch.autograd.grad(gradient, x, direction, retain_graph=True)
        return result.flatten().cpu().double().numpy()

    size = x.numel()
    start = torch.randn(size, generator=generator, device=generator.device).cpu().double().numpy()
    if not gradient.requires_grad or not product(start).any():
        raise UsageError(
            "the Hessian of this energy is zero, because its network is piecewise linear: use `hessian`=False"
        )
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    try:
        values, vectors = eigsh(operator, k=count, which="SA", v0=start, tol=1e-6, maxiter=50)
    except ArpackNoConvergence:
        if size > LARGEST_MATRIX:
            raise UsageError("the smallest eigenvalues of the Hessian do not converge; use `hessian`=False") from None
        rows = []
        with Progress(size, what="row of the Hessian", patience=SHORT) as progress:
            for row in np.eye(size):
                rows.append(product(row))
                progress.advance()
            values, vectors = np.linalg.eigh(np.stack(rows))
    order = np.argsort(values)[:count]
    directions = torch.from_numpy(vectors.T[order].copy()).to(image)
    return torch.from_numpy(values[order].copy()).to(image), directions.view(count, *image.shape)


def find_feature_directions(features: Callable[[Tensor], Tensor], image: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest singular values of the features' Jacobian at an image, and its right singular vectors.

    features: (1, C, H, W) -> (1, width). image: (C, H, W). The singular values (count,) descend; the vectors
    (count, C, H, W) of length 1 are the directions in which the features change most.
    """
    jacobian = torch.func.jacrev(lambda x: features(x[None]).squeeze(0), chunk_size=32)(image)  # (width, C, H, W)
    _, values, vectors = torch.linalg.svd(jacobian.flatten(1), full_matrices=False)
    return values[:count], vectors[:count].view(count, *image.shape)
