"""What the tests of golden cases share: networks with the reference's weights, layouts, and comparisons.

The files of tests/golden and tests/golden/tasks hold what the reference's TensorFlow 1 graphs computed; weights and
inputs come from seeds (recipe.py, recipe_tasks.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

import checkpoint
import models
from conftest import GOLDEN
from golden.tasks import recipe_tasks

TASKS = GOLDEN / "tasks"
SHAPES = {"MnistNet": (1, 28, 28), "DspritesNet": (1, 64, 64), "ResNet32": (3, 32, 32)}


def load_task(name):
    """Return (case, config, variables, inputs) of tests/golden/tasks/task_<name>.npz, see `recipe_tasks.load`."""
    return recipe_tasks.load(TASKS / f"task_{name}.npz")


def read_variables(case, prefix: str, seed: int) -> dict[str, np.ndarray]:
    """Return the TF1 variables that `<prefix>var_names` and `<prefix>var_shapes` of a case list."""
    shapes = [tuple(json.loads(str(shape))) for shape in case[f"{prefix}var_shapes"]]
    names = map(str, case[f"{prefix}var_names"])
    return {name: recipe_tasks.task_variable(name, shape, seed) for name, shape in zip(names, shapes, strict=True)}


def build_network(
    net: str, variables: Mapping[str, np.ndarray], *, label_size: int = 0, **config: Any
) -> models.EnergyNetwork:
    """Return a network in eval mode with the weights of TF1 variables."""
    shape = config.pop("image_shape", None) or SHAPES[net]
    model = models.build_model(models.ModelConfig(net, shape, label_size=label_size, **config)).eval()
    checkpoint.load_tf_variables(model, variables)
    return model


def to_ours(images: np.ndarray) -> Tensor:
    """Return images (N, H, W[, C]) as (N, C, H, W)."""
    tensor = torch.from_numpy(np.asarray(images, np.float32))
    return (tensor[..., None] if tensor.dim() == 3 else tensor).permute(0, 3, 1, 2).contiguous()


def to_theirs(images: Tensor) -> np.ndarray:
    """Return images (N, C, H, W) in the reference's layout, (N, H, W[, C])."""
    images = images.detach().permute(0, 2, 3, 1)
    return (images.squeeze(3) if images.shape[3] == 1 else images).numpy()


def to_tf_layout(name: str, tensor: Tensor) -> np.ndarray:
    """Return our tensor of the TF1 variable `name` as an array float64 in TensorFlow's layout."""
    array = tensor.detach().double().numpy()
    if name.endswith("weight"):
        return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return array[0] if array.ndim == 2 and array.shape[0] == 1 else array


def assert_close(actual, expected, tolerance=2e-4):
    """Compare relative to the size of the whole array: single gradients jump where a leaky ReLU changes sign."""
    actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max()
    assert error <= tolerance * np.abs(expected).max(), (
        f"{error} off, {actual.ravel()[:4]} instead of {expected.ravel()[:4]}"
    )


def compute_share_of_rows(images: Tensor, expected: np.ndarray, tolerance=1e-3) -> float:
    """Return the share of images (N, C, H, W) whose sums, see `recipe_tasks.rows`, agree with the expected ones (N, 3).

    Sums and projections are compared relative to the norm of an image, sums of squares to themselves.
    """
    rows = recipe_tasks.rows(to_theirs(images))
    assert rows.shape == expected.shape
    # The projection direction has unit variance, so an error of norm e moves the first and last column by about e.
    norm = np.sqrt(expected[:, 1:2])
    scale = np.concatenate([norm * np.sqrt(images[0].numel()), expected[:, 1:2], norm], axis=1)
    return float((np.abs(rows - expected) <= tolerance * scale).all(1).mean())


def assert_digests_close(named: Mapping[str, Tensor], case, key: str, tolerance=1e-3):
    """Compare tensors by TF1 name with `<key>_names`, `_norm` and `_dot` of a case: norm, and a random projection."""
    assert set(named) == {str(name) for name in case[f"{key}_names"]}
    negligible = 1e-6 * max(case[f"{key}_norm"])  # the gradient of a key's bias is zero but for rounding
    for name, norm, dot in zip(map(str, case[f"{key}_names"]), case[f"{key}_norm"], case[f"{key}_dot"], strict=True):
        found_norm, found_dot = recipe_tasks.digest(name, to_tf_layout(name, named[name]))
        assert abs(found_norm - norm) <= tolerance * norm + negligible, name
        assert abs(found_dot - dot) <= 3 * tolerance * norm + negligible, name


def compute_gradients(model: models.EnergyNetwork, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a loss by the TF1 names of the variables; those that it does not reach are left out."""
    names = [checkpoint.to_tf_name(name) for name, _ in model.named_parameters()]
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    return {name: gradient for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
