"""The seven energy networks of the reference, built from one conditional convolution and one residual block.

    model = build_model(ModelConfig("ResNet32", image_shape=(3, 32, 32), num_filters=128, label_size=10))
    energies = model(images, labels)                      # (N, C, H, W) in [0, 1], (N, 10) -> (N,)

A Langevin chain evaluates one network dozens of times with unchanged weights, so a network is a pure function of
*prepared weights*: normalised by their spectral norm, pooling and gains folded into the kernels, once per chain.

    energy = freeze_energy(model)                         # for chains: weights prepared once, gradients for images only
    energies = energy(images, labels)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebm.support.hardware import PRECISIONS

Weights = dict[str, Tensor]  # "<layer>.<leaf>" -> tensor, as `EnergyNetwork.prepare` returns them
Activation = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The settings from which a network is rebuilt.

    label_size: the width of a label vector, 0 for an unconditional network. start_rank: the rank of the distribution of
    chains' starts that the network carries, see `GaussianStarts`; 0: chains start from noise.
    """

    network: str
    image_shape: tuple[int, int, int]  # (C, H, W)
    num_filters: int
    label_size: int = 0
    spec_norm: bool = True
    spec_iter: int = 1
    spec_norm_val: float = 1.0
    use_attention: bool = False
    swish_act: bool = False
    downsample: bool = False
    start_rank: int = 0

    @property
    def has_classes(self) -> bool:
        """Whether labels are classes, one-hot; sprites have labels of width 1 and 2 that are quantities."""
        return self.label_size > (2 if self.network == "DspritesNet" else 0)


@dataclasses.dataclass(frozen=True)
class WeightForm:
    """The form of prepared weights: which of several ways to compute the same energy they stand for.

    All forms give equal energies up to rounding; which one is fastest depends on the machine. fold: average pooling is
    merged into the kernel before it. patches: on a CPU, a convolution of a single channel, or of one beside the planes
    of a label, is a matrix product of patches. memory_format: that of all other kernels.
    """

    fold: bool = True
    patches: bool = True
    memory_format: torch.memory_format = torch.channels_last


def leaky_relu(x: Tensor) -> Tensor:
    """Return the leaky ReLU of x with slope 0.2, the default of TensorFlow."""
    return F.leaky_relu(x, 0.2)


# ---------------------------------------------------------------------------------------------------------------------
# Layers. A layer prepares its tensors once; after that it is a pure function of them: layer(weights, x, labels).


class NormalizedLayer(nn.Module):
    """A weight of shape (c_out, ...) divided by its spectral norm, estimated by power iteration on the stored `u`.

    zero_init: for the second convolution of a residual block, which starts near zero. It is only ever scaled down: a
    spectral norm below 1 is left as it is. takes_patches: the layer is a convolution that can be a product of patches.
    """

    takes_patches = False

    def __init__(self, shape: tuple[int, ...], config: ModelConfig, *, spec_norm: bool = True, zero_init: bool = False):
        super().__init__()
        self.name = ""  # set by the network: the prefix of this layer's tensors among the prepared weights
        self.zero_init = zero_init
        self.rounds, self.scale = config.spec_iter, config.spec_norm_val
        self.weight = nn.Parameter(torch.empty(shape))
        self.u: Tensor | None
        self.register_buffer("u", torch.empty(1, shape[0]) if config.spec_norm and spec_norm else None)

    def uses_patches(self, form: WeightForm) -> bool:
        """Return whether this layer is a product of patches in a form of weights, with its weights on their device."""
        return form.patches and self.takes_patches and self.weight.device.type == "cpu"

    def prepare(self, update_u: bool, form: WeightForm) -> Weights:
        """Return this layer's prepared tensors; `forward` looks them up as "<self.name>.<key>"."""
        raise NotImplementedError

    def draw_initial_values(self, generator: torch.Generator | None) -> None:
        """Draw the reference's initial values: N(0, 1) for a normalised weight, else Glorot uniform, or zero."""
        if self.u is not None:
            self.u.normal_(generator=generator)
            self.weight.data.normal_(std=1e-10 if self.zero_init else 1.0, generator=generator)
        elif self.zero_init:
            self.weight.data.zero_()
        else:
            nn.init.xavier_uniform_(self.weight, generator=generator)

    def normalize_weight(self, update_u: bool) -> Tensor:
        """Return weight / sigma · spec_norm_val, differentiable in the weight but not in u and v."""
        if self.u is None:
            return self.weight
        matrix = self.weight.flatten(1)  # (c_out, rest)
        with torch.no_grad():
            u = self.u
            for _ in range(self.rounds):
                v = F.normalize(u @ matrix, dim=1)  # (1, rest)
                u = F.normalize(v @ matrix.T, dim=1)  # (1, c_out)
            if update_u:
                self.u.copy_(u)
        sigma = (u @ matrix @ v.T).squeeze()
        if self.zero_init:
            sigma = sigma + 1e-6
            return self.weight * (sigma.clamp(max=1.0) / sigma * self.scale)
        return self.weight * (self.scale / sigma)


def compute_same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return the padding (before, after) of TensorFlow's SAME rule, which puts the odd pixel at the end."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def convolve_patches(x: Tensor, matrix: Tensor, size: int, stride: int, padding: tuple[int, int]) -> Tensor:
    """Return the convolution of x with a kernel of size x size, as one product of its patches with a matrix.

    matrix: the kernel, (c_in · size · size, c_out), or one for each image, (N, c_in · size · size, c_out). The result
    is in channels-last memory format.
    """
    patches = F.unfold(x, size, stride=stride, padding=padding).transpose(1, 2)  # (N, positions, c_in · size · size)
    height = (x.shape[2] + 2 * padding[0] - size) // stride + 1
    return (patches @ matrix).unflatten(1, (height, -1)).permute(0, 3, 1, 2)


def fold_average_pooling(kernel: Tensor) -> Tensor:
    """Return the 4x4 kernel that, with stride 2, equals this 3x3 `kernel` followed by 2x2 average pooling.

    It is the mean of the 3x3 kernel shifted by (0, 0), (0, 1), (1, 0) and (1, 1). It takes 2.25 times fewer
    multiplications.
    """
    return sum(F.pad(kernel, (dx, 1 - dx, dy, 1 - dy)) for dx in (0, 1) for dy in (0, 1)) / 4  # type: ignore[return-value]


def select_per_channel(table: Tensor, labels: Tensor | None) -> Tensor:
    """Return the values per channel that labels select from a table (label_size, c), as (N, c, 1, 1).

    Without labels the table has one row, which is returned as (1, c, 1, 1).
    """
    return (table if labels is None else labels @ table)[:, :, None, None]


class Conv(NormalizedLayer):
    """The conditional convolution: (x + input bias) * kernel · gain, then the activation; SAME padding.

    Bias and gain have a value for each channel; in a conditional network the label selects them. There is no output
    bias. pooled: apply 2x2 average pooling before the gain. With the config's `downsample`, a convolution of stride 2
    has stride 1 instead and is followed by 2x2 average pooling after the activation.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        config: ModelConfig,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        input_bias: bool = False,
        gain: bool = False,
        pooled: bool = False,
        zero_init: bool = False,
        activation: Activation | None = None,
    ):
        super().__init__((c_out, c_in, kernel_size, kernel_size), config, zero_init=zero_init)
        self.pool_after = stride == 2 and config.downsample
        self.stride = 1 if self.pool_after else stride
        self.pooled, self.activation = pooled, activation
        self.takes_patches = c_in == 1 and not pooled
        self.conditional = config.label_size > 0
        rows = max(config.label_size, 1)
        self.gb = nn.Parameter(torch.zeros(rows, c_in)) if input_bias else None
        self.g = nn.Parameter(torch.ones(rows, c_out)) if gain else None
        self.cb = nn.Parameter(torch.zeros(c_in)) if gain and self.conditional else None

    def prepare(self, update_u: bool, form: WeightForm) -> Weights:
        kernel = self.normalize_weight(update_u)
        weights: Weights = {}
        if self.gb is not None:
            weights["input_bias"] = self.gb
        if self.g is not None and self.cb is not None:
            weights["gain"], weights["gain_bias"] = self.g, self.cb
        elif self.g is not None:
            kernel = kernel * self.g.view(-1, 1, 1, 1)  # an unconditional gain is folded into the kernel
        if form.fold and self.pooled:
            kernel = fold_average_pooling(kernel)
        if self.uses_patches(form):
            weights["kernel"] = kernel.flatten(1).T.clone()
        else:
            # The formats of a single channel differ in strides alone; only a copy gets those that PyTorch goes by.
            weights["kernel"] = kernel.clone(memory_format=form.memory_format)
        return weights

    def forward(self, weights: Weights, x: Tensor, labels: Tensor | None) -> Tensor:
        if self.gb is not None:
            x = x + select_per_channel(weights[f"{self.name}.input_bias"], labels)
        return self.finish(weights, self.convolve(weights, x), labels)

    def convolve(self, weights: Weights, x: Tensor) -> Tensor:
        """Return the linear part: the convolution of x with the kernel, and the pooling before the gain."""
        kernel = weights[f"{self.name}.kernel"]
        if self.pooled and kernel.shape[-1] == 4:  # the pooling is folded into the kernel
            return F.conv2d(x, kernel, stride=2, padding=1)
        size = self.weight.shape[-1]
        rows, columns = (compute_same_padding(side, size, self.stride) for side in x.shape[2:])
        if rows[0] != rows[1] or columns[0] != columns[1]:
            x, rows, columns = F.pad(x, (*columns, *rows)), (0, 0), (0, 0)
        padding = rows[0], columns[0]
        if kernel.dim() == 2:
            x = convolve_patches(x, kernel, size, self.stride, padding)
        else:
            x = F.conv2d(x, kernel, stride=self.stride, padding=padding)
        return F.avg_pool2d(x, 2) if self.pooled else x

    def finish(self, weights: Weights, x: Tensor, labels: Tensor | None) -> Tensor:
        """Return what follows the convolution x: gain, activation and, with `downsample`, the pooling."""
        if self.cb is not None:
            gain = select_per_channel(weights[f"{self.name}.gain"], labels)
            x = x * (gain + weights[f"{self.name}.gain_bias"][:, None, None])
        if self.activation is not None:
            x = self.activation(x)
        if self.pool_after:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return x

    def bind_input(self, weights: Weights, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return this layer with an input bias as a function of labels (N·m, label_size), m for each of N inputs.

        Nothing is convolved for a label, because conv(x + labels · bias) = conv(x) + labels · conv(bias).
        """
        table = weights[f"{self.name}.input_bias"]  # (label_size, c_in)
        convolved = self.convolve(weights, x)
        maps = self.convolve(weights, table[:, :, None, None].expand(-1, -1, *x.shape[2:]))  # (label_size, c_out, H, W)
        matrix = maps.permute(0, 2, 3, 1).flatten(1)

        def compute_output(labels: Tensor) -> Tensor:
            shift = (labels @ matrix).unflatten(1, (*maps.shape[2:], -1)).permute(0, 3, 1, 2)  # channels last
            return self.finish(weights, repeat_each(convolved, len(labels)) + shift, labels)

        return compute_output


def repeat_each(x: Tensor, total: int) -> Tensor:
    """Return every row of x (N, ...) several times in a row, as (total, ...); total: a multiple of N."""
    return x if len(x) == total else x.repeat_interleave(total // len(x), 0)


class ConvWithPlanes(NormalizedLayer):
    """The convolution by which MnistNet is conditioned: 3x3, of the image and of the label / 10 as constant planes.

    As a product of patches, an image has a single plane of ones instead, and kernels of its own: that of the plane is
    the sum of the label's kernels, weighted by the label. This takes far fewer multiplications.
    """

    def __init__(self, c_image: int, c_out: int, config: ModelConfig, *, activation: Activation):
        super().__init__((c_out, c_image + config.label_size, 3, 3), config)
        self.takes_patches, self.activation = c_image == 1, activation

    def prepare(self, update_u: bool, form: WeightForm) -> Weights:
        kernel = self.normalize_weight(update_u)
        if not self.uses_patches(form):
            return {"kernel": kernel.contiguous(memory_format=form.memory_format)}
        image, planes = kernel.flatten(2).permute(1, 2, 0).tensor_split([1])  # (channels, 3 · 3, c_out)
        return {"kernel": image.clone(), "label_kernels": planes.flatten(1) / 10}

    def forward(self, weights: Weights, x: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None, "a conditional network checks its labels before its first stage"
        kernel, plane_shape = weights[f"{self.name}.kernel"], (len(x), -1, *x.shape[2:])
        if kernel.dim() == 4:
            x = torch.cat([x, (labels / 10)[:, :, None, None].expand(plane_shape)], 1)
            return self.activation(F.conv2d(x.contiguous(memory_format=torch.channels_last), kernel, padding=1))
        label_kernels = (labels @ weights[f"{self.name}.label_kernels"]).unflatten(1, (9, -1))  # (N, 3 · 3, c_out)
        matrices = torch.cat([kernel.expand(len(x), -1, -1), label_kernels], 1)
        x = torch.cat([x, x.new_ones(1, 1, 1, 1).expand(plane_shape)], 1)
        return self.activation(convolve_patches(x, matrices, 3, 1, (1, 1)))


class Dense(NormalizedLayer):
    """A fully connected layer with bias and activation, (N, n_in) -> (N, n_out)."""

    def __init__(self, n_in: int, n_out: int, config: ModelConfig, *, spec_norm: bool, activation: Activation | None):
        super().__init__((n_out, n_in), config, spec_norm=spec_norm)
        self.activation = activation
        self.b = nn.Parameter(torch.zeros(n_out))

    def prepare(self, update_u: bool, form: WeightForm) -> Weights:
        weights: Weights = {"kernel": self.normalize_weight(update_u), "bias": self.b}
        return weights

    def forward(self, weights: Weights, x: Tensor, labels: Tensor | None) -> Tensor:
        x = F.linear(x, weights[f"{self.name}.kernel"], weights[f"{self.name}.bias"])
        return x if self.activation is None else self.activation(x)


class Projection(NormalizedLayer):
    """A 1x1 convolution for self attention, (N, c_in, H, W) -> (N, c_out, H·W)."""

    def __init__(self, c_in: int, c_out: int, config: ModelConfig, *, bias: bool):
        super().__init__((c_out, c_in, 1, 1), config)
        self.b = nn.Parameter(torch.zeros(c_out)) if bias else None

    def prepare(self, update_u: bool, form: WeightForm) -> Weights:
        kernel = self.normalize_weight(update_u)
        return {"kernel": kernel} if self.b is None else {"kernel": kernel, "bias": self.b}

    def forward(self, weights: Weights, x: Tensor, labels: Tensor | None) -> Tensor:
        return F.conv2d(x, weights[f"{self.name}.kernel"], weights.get(f"{self.name}.bias")).flatten(2)


class SelfAttention(nn.Module):
    """Self attention over positions: x + gamma · softmax(q kᵀ) v, not scaled by 1/sqrt(width), as in the reference."""

    def __init__(self, channels: int, key_channels: int, config: ModelConfig):
        super().__init__()
        self.name = ""
        self.q = Projection(channels, key_channels, config, bias=True)
        self.k = Projection(channels, key_channels, config, bias=True)
        self.v = Projection(channels, channels, config, bias=False)  # its bias is in checkpoints, but never used
        self.gamma = nn.Parameter(torch.zeros(1))

    def prepare(self, update_u: bool, form: WeightForm) -> Weights:
        return {"gamma": self.gamma}

    def forward(self, weights: Weights, x: Tensor, labels: Tensor | None) -> Tensor:
        query, key = self.q(weights, x, labels), self.k(weights, x, labels)
        value = leaky_relu(self.v(weights, x, labels))  # (N, channels, H·W)
        attention = (query.transpose(1, 2) @ key).softmax(dim=2)  # (N, H·W, H·W)
        return x + weights[f"{self.name}.gamma"] * (value @ attention.transpose(1, 2)).view_as(x)


class ResidualBlock(nn.Module):
    """The residual block of all ResNets: act(pool(conv(act(dropout(conv(x))))) + skip(x)).

    The skip is the identity, or a 3x3 convolution if the number of channels changes, and pooled if the block is.
    """

    def __init__(
        self, c_in: int, c_out: int, config: ModelConfig, *, down: bool, activation: Activation, dropout: bool
    ):
        super().__init__()
        self.activation, self.down, self.has_dropout = activation, down, dropout
        self.c1 = Conv(c_in, c_out, config, input_bias=True)
        self.c2 = Conv(c_out, c_out, config, input_bias=True, gain=True, pooled=down, zero_init=True)
        self.adaptive = Conv(c_in, c_out, config, pooled=down) if c_in != c_out else None

    def forward(self, weights: Weights, x: Tensor, labels: Tensor | None) -> Tensor:
        h = self.c1(weights, x, labels)
        h = F.dropout(h, 0.5, training=self.has_dropout and self.training)
        h = self.c2(weights, self.activation(h), labels)
        if self.adaptive is not None:
            x = self.adaptive(weights, x, labels)
        elif self.down:
            x = F.avg_pool2d(x, 2)
        return self.activation(h + x)


class Flatten(nn.Module):
    """The stage (N, C, H, W) -> (N, H·W·C), in the order of the reference's NHWC tensors.

    In channels-last memory format it copies nothing.
    """

    def forward(self, weights: Weights, x: Tensor, labels: Tensor | None) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


class GlobalSum(nn.Module):
    """The stage (N, C, H, W) -> (N, C): the activation, then the sum over all positions."""

    def __init__(self, activation: Activation):
        super().__init__()
        self.activation = activation

    def forward(self, weights: Weights, x: Tensor, labels: Tensor | None) -> Tensor:
        return self.activation(x).sum(dim=(2, 3))


# ---------------------------------------------------------------------------------------------------------------------
# Where chains start


class GaussianStarts(nn.Module):
    """The distribution of chains' starts: a normal distribution for each class, fitted to its images.

    This is the informative initialisation of JEM++ (Yang and Ji 2021), here with covariances of the rank
    `config.start_rank`. An unconditional network has one distribution for all images.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.image_shape = config.image_shape
        rows, pixels = max(config.label_size, 1), math.prod(config.image_shape)
        self.mean: Tensor
        self.factor: Tensor
        self.register_buffer("mean", torch.full((rows, pixels), 0.5))
        self.register_buffer("factor", torch.zeros(rows, config.start_rank, pixels))

    @torch.no_grad()
    def fit(self, images: Tensor, labels: Tensor | None) -> None:
        """Fit the means and the leading directions of the covariances to images (N, C, H, W) in [0, 1].

        labels: one-hot (N, classes); None for an unconditional network. A class without images keeps a grey mean.
        """
        classes = torch.zeros(len(images), dtype=torch.long) if labels is None else labels.argmax(1).cpu()
        pixels = images.flatten(1).cpu()
        with torch.random.fork_rng([]):  # svd_lowrank draws from the global generator
            torch.default_generator.manual_seed(0)
            for row in classes.unique().tolist():
                of_class = pixels[classes == row]
                mean = of_class.mean(0)
                rank = min(self.factor.shape[1], len(of_class) - 1, len(mean))
                self.mean[row] = mean
                if rank > 0:
                    _, values, directions = torch.svd_lowrank(of_class - mean, rank, niter=4)
                    self.factor[row, :rank] = (directions * values).T / (len(of_class) - 1) ** 0.5

    def draw(self, labels: Tensor | None, number: int, generator: torch.Generator) -> Tensor:
        """Return random starts (number, C, H, W) in [0, 1] for labels (number, classes), or None."""
        rank = self.factor.shape[1]
        rows = torch.zeros(number, dtype=torch.long, device=self.mean.device)
        if labels is not None and labels.shape[1]:
            rows = labels.argmax(1)
        noise = torch.randn(number, rank, generator=generator, device=self.mean.device)
        pixels = self.mean[rows]
        for row in rows.unique().tolist():  # class by class, because memory may not hold a factor for each image
            pixels[rows == row] += noise[rows == row] @ self.factor[row]
        return pixels.clamp(0, 1).view(number, *self.image_shape)


# ---------------------------------------------------------------------------------------------------------------------
# Networks: name -> stages


def build_mnist_stages(config: ModelConfig) -> dict[str, nn.Module]:
    """Return the stages of MnistNet: a 3x3 convolution, three 4x4 convolutions of stride 2 and a dense head."""
    width = config.num_filters
    activation = F.silu if config.swish_act else leaky_relu
    first = ConvWithPlanes if config.label_size else Conv
    stages: dict[str, nn.Module] = {"c1_pre": first(config.image_shape[0], 64, config, activation=activation)}
    for name, c_in, c_out in (("c1", 64, width), ("c2", width, 2 * width), ("c3", 2 * width, 4 * width)):
        stages[name] = Conv(c_in, c_out, config, kernel_size=4, stride=2, activation=activation)
    return stages | build_dense_head(4 * width, 2 * width, 3, config, activation)


def build_dsprites_stages(config: ModelConfig) -> dict[str, nn.Module]:
    """Return the stages of DspritesNet: a 3x3 convolution, four 4x4 convolutions of stride 2 and a dense head."""
    width = config.num_filters
    activation = F.silu if config.swish_act else leaky_relu
    stages: dict[str, nn.Module] = {"c1_pre": Conv(config.image_shape[0], 32, config, activation=activation)}
    widths = {"c1": (32, width), "c2": (width, 2 * width), "c3": (2 * width, 2 * width), "c4": (2 * width, 2 * width)}
    for name, (c_in, c_out) in widths.items():
        stages[name] = Conv(
            c_in, c_out, config, kernel_size=4, stride=2, input_bias=True, gain=name == "c3", activation=activation
        )
    return stages | build_dense_head(2 * width, 2 * width, 4, config, activation)


def build_dense_head(
    channels: int, width: int, halvings: int, config: ModelConfig, activation: Activation
) -> dict[str, nn.Module]:
    """Return the last stages of a convolutional network: flattening, one hidden layer and the energy.

    halvings: the number of stride-2 convolutions before the head. width: that of the hidden layer.
    """
    positions = math.prod(math.ceil(size / 2**halvings) for size in config.image_shape[1:])
    return {
        "flatten": Flatten(),
        "fc_dense": Dense(positions * channels, width, config, spec_norm=True, activation=activation),
        "fc5": Dense(width, 1, config, spec_norm=False, activation=None),
    }


@dataclasses.dataclass(frozen=True)
class ResNet:
    """A residual network as a table.

    blocks: "name:width" for each block, in units of num_filters, with "↓" if the block halves the image. attention:
    the block that self attention follows, its channels and its key channels in units of num_filters. With attention,
    the block named in `replaces` is left out.
    """

    blocks: str
    attention: tuple[str, float, float]
    replaces: str = ""
    stem: int = 0  # channels of the first convolution, 0: num_filters
    swish: bool = False  # whether the network obeys `swish_act`
    conditional_leaky_head: bool = False
    dropout: bool = False

    def stages(self, config: ModelConfig) -> dict[str, nn.Module]:
        """Return the stages of the network, by their names in checkpoints."""
        swish = self.swish and config.swish_act
        activation = F.silu if swish else leaky_relu
        width, channels = config.num_filters, self.stem or config.num_filters
        stages: dict[str, nn.Module] = {}
        stages["c1_pre"] = Conv(config.image_shape[0], channels, config, activation=activation)
        for block in self.blocks.split():
            name, multiple = block.rstrip("↓").split(":")
            c_out = int(multiple) * width
            if not (config.use_attention and name == self.replaces):
                # The reference's first block is leaky even with swish_act: published weights depend on it.
                act = leaky_relu if name == "res_optim" else activation
                down = block.endswith("↓")
                stages[name] = ResidualBlock(channels, c_out, config, down=down, activation=act, dropout=self.dropout)
            if config.use_attention and name == self.attention[0]:
                stages["atten"] = SelfAttention(int(self.attention[1] * width), int(self.attention[2] * width), config)
            channels = c_out
        leaky_head = self.conditional_leaky_head and config.label_size > 0
        stages["sum"] = GlobalSum(F.silu if swish else leaky_relu if leaky_head else F.relu)
        stages["fc5"] = Dense(channels, 1, config, spec_norm=False, activation=None)
        return stages


NETWORKS: dict[str, Callable[[ModelConfig], dict[str, nn.Module]]] = {
    "MnistNet": build_mnist_stages,
    "DspritesNet": build_dsprites_stages,
    "ResNet32": ResNet(
        "res_optim:1↓ res_1:1 res_2:2↓ res_3:2 res_4:2↓ res_5:2", attention=("res_3", 2, 0.5), replaces="res_3"
    ).stages,
    "ResNet32Large": ResNet(
        "res_optim:1↓ res_1:1 res_2:1 res_3:2↓ res_4:2 res_5:2 res_6:4↓ res_7:4 res_8:4",
        attention=("res_4", 2, 1),
        replaces="res_4",
        conditional_leaky_head=True,
        dropout=True,
    ).stages,
    "ResNet32Larger": ResNet(
        "res_optim:1↓ res_1:1 res_2:1 res_2a:1 res_2b:1 res_3:2↓ res_4:2 res_5:2 res_5a:2 res_5b:2 "
        "res_6:4↓ res_7:4 res_8:4 res_8a:4 res_8b:4",
        attention=("res_4", 2, 0.5),
        replaces="res_4",
        conditional_leaky_head=True,
    ).stages,
    "ResNet32Wider": ResNet(
        "res_optim:1↓ res_1:1 res_2:1 res_3:2↓ res_4:2 res_5:2 res_6:4↓ res_7:4 res_8:4",
        attention=("res_1", 1, 0.5),
        replaces="res_1",
        stem=128,
        swish=True,
    ).stages,
    "ResNet128": ResNet(
        "res_optim:1↓ res_3:2↓ res_5:4↓ res_7:8↓ res_9:8↓ res_10:8",
        attention=("res_optim", 1, 0.5),
        stem=64,
        swish=True,
    ).stages,
}

# Layers that are piecewise linear if their activations are.
PIECEWISE_LINEAR_LAYERS = (Conv, ConvWithPlanes, Dense, ResidualBlock, Flatten, GlobalSum)

# A residual network halves images so often that nothing is left of smaller ones; the others round their sides up.
SMALLEST_SIDES = {"ResNet128": 32} | dict.fromkeys(("ResNet32", "ResNet32Large", "ResNet32Larger", "ResNet32Wider"), 8)


class EnergyNetwork(nn.Module):
    """A network that maps images to energies: a sequence of stages, evaluated with prepared weights.

    settings: those of its training, by the names of train.py's flags; class_names: of the classes that it is
    conditioned on. Both are empty unless a checkpoint that records them was loaded. form: that of its prepared weights.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.settings: Mapping[str, Any] = {}
        self.class_names: tuple[str, ...] = ()
        self.form = WeightForm()
        self.stages = nn.ModuleDict(NETWORKS[config.network](config))
        self.starts = GaussianStarts(config) if config.start_rank else None
        for name, module in self.stages.named_modules():
            if isinstance(module, NormalizedLayer | SelfAttention):
                module.name = name

    @property
    def is_piecewise_linear(self) -> bool:
        """Whether the energy is a piecewise linear function of the image, so that its second derivatives are 0."""
        return all(
            isinstance(layer, (nn.ModuleDict, *PIECEWISE_LINEAR_LAYERS))
            and getattr(layer, "activation", None) in (None, leaky_relu, F.relu)
            for layer in self.stages.modules()
        )

    def prepare(self, *, update_u: bool = False, form: WeightForm | None = None) -> Weights:
        """Return the prepared weights: normalised once, differentiable in the parameters.

        update_u: store the new `u` of the power iteration, as the reference does once per training iteration. form:
        that of the weights; None: the network's own.
        """
        prepared: Weights = {}
        for module in self.modules():
            if isinstance(module, NormalizedLayer | SelfAttention):
                tensors = module.prepare(update_u, form or self.form)
                prepared |= {f"{module.name}.{leaf}": tensor for leaf, tensor in tensors.items()}
        return prepared

    def energy(self, weights: Weights, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the energies (N,) of images (N, C, H, W) under labels (N, label_size), a pure function of `weights`.

        Only ResNet32Large in training mode draws random numbers (dropout, also in chains, as in the reference).
        Raises ValueError if images or labels do not have the network's shape.
        """
        label_size = self.config.label_size
        if tuple(images.shape[1:]) != self.config.image_shape:
            raise ValueError(f"images of shape {tuple(images.shape[1:])}, the network takes {self.config.image_shape}")
        if label_size and (labels is None or labels.shape != (len(images), label_size)):
            shape = None if labels is None else tuple(labels.shape)
            raise ValueError(f"labels of shape {shape}, the network takes {(len(images), label_size)}")
        dtype = weights["fc5.kernel"].dtype
        labels = labels.to(dtype) if label_size and labels is not None else None
        x = run_stages(list(self.stages.values()), weights, images.to(dtype), labels)
        return x.squeeze(1).to(images.dtype)

    def bind_images(self, weights: Weights, images: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the energy (N·m,) of images (N, C, H, W) as a function of labels (N·m, label_size), m for each image.

        What does not depend on the labels is computed once: the first stages and, in DspritesNet, the convolution that
        follows them.
        """
        stages, dtype = list(self.stages.values()), weights["fc5.kernel"].dtype
        first = next(
            k
            for k, stage in enumerate(stages)
            if not (isinstance(stage, Conv) and stage.gb is None and stage.cb is None)
        )
        x, labelled = run_stages(stages[:first], weights, images.to(dtype), None), stages[first]
        if isinstance(labelled, Conv):
            begin, rest = labelled.bind_input(weights, x), stages[first + 1 :]
        else:
            begin, rest = lambda labels: repeat_each(x, len(labels)), stages[first:]

        def compute_energies(labels: Tensor) -> Tensor:
            labels = labels.to(dtype)
            return run_stages(rest, weights, begin(labels), labels).squeeze(1).to(images.dtype)

        return compute_energies

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.energy(self.prepare(), images, labels)


def run_stages(stages: Sequence[nn.Module], weights: Weights, x: Tensor, labels: Tensor | None) -> Tensor:
    """Return the output of stages that follow one another, images between them in channels-last memory format."""
    for stage in stages:
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        x = stage(weights, x, labels)
    return x


def build_model(config: ModelConfig, generator: torch.Generator | None = None) -> EnergyNetwork:
    """Return a new network with the reference's initial values, drawn from `generator`."""
    model = EnergyNetwork(config)
    for module in model.modules():
        if isinstance(module, NormalizedLayer):
            module.draw_initial_values(generator)
    return model


def cast(weights: Weights, dtype: torch.dtype | None) -> Weights:
    """Return prepared weights converted to a number type, in which the network then computes.

    dtype: None leaves the weights as they are. Images, energies and the network's parameters stay float32.
    """
    return {name: tensor.to(dtype or tensor.dtype) for name, tensor in weights.items()}


def detach(weights: Weights, dtype: torch.dtype | None = None) -> Weights:
    """Return prepared weights without their autograd graph, for chains, which need gradients for images only.

    Those that are parameters themselves, such as biases, are copied, so that an update of the network leaves them.
    """
    frozen = {
        name: tensor.detach().clone() if isinstance(tensor, nn.Parameter) else tensor.detach()
        for name, tensor in weights.items()
    }
    return cast(frozen, dtype)


def spectral_norm_once(model: EnergyNetwork, dtype: torch.dtype | None = None) -> Weights:
    """Return the frozen prepared weights of a model for a whole chain, for `model.energy(weights, images, labels)`.

    One power iteration (`spec_iter` rounds) starts from the stored `u`, which stays as it is. The reference's
    evaluation scripts do so with `spec_eval`; without it each graph run moves `u` on.
    """
    with torch.no_grad():
        return detach(model.prepare(), dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Energies as functions


@dataclasses.dataclass(frozen=True)
class PreparedEnergy:
    """An energy of images under labels whose network weights were prepared once for many evaluations.

    rescale: a factor of the images, for images in [0, 1] and a network trained on [0, rescale]. temperature: a factor
    of the energy.
    """

    model: EnergyNetwork
    weights: Weights
    rescale: float = 1.0
    temperature: float = 1.0

    def __call__(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the energies (N,) of images (N, C, H, W) under labels (N, label_size), or None."""
        images = images if self.rescale == 1.0 else images * self.rescale  # saves most models an operation per step
        return self.temperature * self.model.energy(self.weights, images, labels)

    def under(self, labels: Tensor | None) -> Callable[[Tensor], Tensor]:
        """Return the energy under these labels, as a function of images alone."""
        return lambda images: self(images, labels)

    def at(self, images: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the energy of these images as a function of labels alone, see `EnergyNetwork.bind_images`."""
        energy = self.model.bind_images(self.weights, images * self.rescale)
        return lambda labels: self.temperature * energy(labels)


def freeze_energy(
    model: EnergyNetwork, *, precision: str = "float32", rescale: float = 1.0, temperature: float = 1.0
) -> PreparedEnergy:
    """Return the energy that chains descend, with weights normalised once and frozen; see `PreparedEnergy`.

    precision: the number type in which it is computed, one of PRECISIONS.
    """
    return PreparedEnergy(model, spectral_norm_once(model, PRECISIONS[precision]), rescale, temperature)


def compute_label_energies(energy: Callable[[Tensor, Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Return the energy E(x, y) of every image (N, C, H, W) under every label (M, label_size), as (N, M)."""
    n, m = len(images), len(labels)
    return energy(images.repeat_interleave(m, 0), labels.repeat(n, 1)).view(n, m)


def compute_class_logits(energy: Callable[[Tensor, Tensor], Tensor], images: Tensor, classes: int) -> Tensor:
    """Return the class logits of every image: −E(x, y) under every class, as (N, classes)."""
    return -compute_label_energies(energy, images, torch.eye(classes, device=images.device, dtype=images.dtype))


def draw_starts(
    model: EnergyNetwork,
    number: int,
    labels: Tensor | None,
    generator: torch.Generator | Sequence[torch.Generator],
    rescale: float = 1.0,
) -> Tensor:
    """Return images (number, C, H, W) in [0, rescale] for chains to start from, as in the model's training.

    They are drawn from `GaussianStarts` under labels (number, label_size) if the model has them, else they are noise.
    generator: one for all images, or one for each.
    """
    if not isinstance(generator, torch.Generator):
        rows = [None] * number if labels is None else labels.split(1)
        return torch.cat([draw_starts(model, 1, *pair, rescale) for pair in zip(rows, generator, strict=True)])
    if model.starts is None:
        return draw_noise_images(model.config, number, generator, rescale)
    return rescale * model.starts.draw(labels, number, generator)


def draw_noise_images(config: ModelConfig, number: int, generator: torch.Generator, rescale: float = 1.0) -> Tensor:
    """Return noise (number, C, H, W) that chains start from: uniform in [0, rescale], or 0.5 + 0.5·N(0, 1) for sprites.

    The network of sprites is DspritesNet; its noise does not depend on rescale.
    """
    shape = number, *config.image_shape
    if config.network == "DspritesNet":
        return 0.5 + 0.5 * torch.randn(shape, generator=generator, device=generator.device)
    return rescale * torch.rand(shape, generator=generator, device=generator.device)
