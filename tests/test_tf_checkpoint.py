"""The reader of TF1 checkpoints against two files that TensorFlow wrote, and against damage of every kind."""

import dataclasses
import json
import pathlib
import random
import shutil
import struct

import numpy as np
import pytest
import torch

import checkpoint
import convert_checkpoint
import models
import sampling
from conftest import GOLDEN, encode_field, encode_varint
from ebm.readers import tensorflow
from ebm.settings import (
    AisSettings,
    CombineSettings,
    DemoSettings,
    InceptionSettings,
    SampleSettings,
    SandboxSettings,
)
from ebm.support import cli
from ebm.support.errors import UsageError
from ebm.tasks.trained_models import open_model
from golden import recipe
from golden_cases import assert_close, build_network, to_ours
from utils import ClippedAdam

google_crc32c = pytest.importorskip("google_crc32c")

REAL = {
    "cifar10_cond": GOLDEN / "tf_checkpoints" / "cifar10_cond" / "model_74700",
    "dsprites_cond_pos": GOLDEN / "tf_checkpoints" / "dsprites_cond_pos" / "model_8000",
}
CASES = [path.stem for path in sorted(GOLDEN.glob("*.npz")) if "var_names" in np.load(path)]
real = pytest.mark.parametrize("name", REAL)


# ---------------------------------------------------------------------------------------------------------------------
# The files that TensorFlow wrote


@real
def test_every_variable(name):
    """Breaks when a name, a shape, an offset or the order of bytes is misread."""
    case = np.load(GOLDEN / "tf_checkpoints" / f"{name}.npz")
    expected: dict[str, np.ndarray | np.float32] = {"beta1_power": np.float32(0), "beta2_power": np.float32(0.999)}
    for variable, shape in zip(case["var_names"], case["var_shapes"], strict=True):
        expected[str(variable)] = recipe.variable(str(variable), tuple(json.loads(str(shape))), seed=3)
    for variable in case["grad_cd_names"]:
        expected[f"{variable}/Adam"] = expected[f"{variable}/Adam_1"] = np.zeros_like(expected[str(variable)])

    variables = tensorflow.read_tf_checkpoint(REAL[name])
    assert set(variables) == set(expected)
    for variable, array in expected.items():
        assert variables[variable].dtype == np.float32
        np.testing.assert_array_equal(variables[variable], array, err_msg=variable, strict=True)


@real
def test_golden_results(name):
    """Breaks when a variable lands in the wrong place of the network, or the wrong network is inferred."""
    case, _, x, labels, _ = recipe.load(GOLDEN / "tf_checkpoints" / f"{name}.npz")
    config = json.loads(str(case["config"]))
    swish_act = config["flags"].get("swish_act", False)
    model = checkpoint.load_energy(REAL[name], swish_act=swish_act)
    assert not model.training
    weights = models.spectral_norm_once(model)
    images = torch.from_numpy(x.reshape(len(x), *x.shape[1:3], -1)).permute(0, 3, 1, 2)

    def energy(images):
        return model.energy(weights, images, torch.from_numpy(labels))

    np.testing.assert_allclose(energy(images), case["energy"], rtol=2e-4)
    step_lr, proj_norm = config.get("step_lr", 10.0), config.get("proj_norm", 0.01)
    chain = sampling.langevin(energy, images, num_steps=5, step_lr=step_lr, noise_std=0.0, proj_norm=proj_norm)
    np.testing.assert_allclose(chain.permute(0, 2, 3, 1).reshape(x.shape), case["x_chain"], atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Inference of the network


def variables_of(name, slots=True):
    """Return the variables (all zero) that the reference's checkpoint of a golden case has, and the case's config."""
    case = np.load(GOLDEN / f"{name}.npz")
    shapes = zip(map(str, case["var_names"]), map(str, case["var_shapes"]), strict=True)
    variables = {name: np.broadcast_to(np.float32(0), json.loads(shape)) for name, shape in shapes}
    if slots:  # the optimizer has them for whatever has a gradient
        for name in map(str, case["grad_cd_names"]):
            variables[f"{name}/Adam"] = variables[f"{name}/Adam_1"] = variables[name]
    return variables, json.loads(str(case["config"]))


@pytest.mark.parametrize("name", CASES)
def test_infer_config(name):
    """Breaks when network, width, labels (one class included), attention or normalisation is inferred wrongly."""
    variables, case = variables_of(name)
    flags = case.get("flags", {})
    config = checkpoint.infer_config(variables, swish_act=flags.get("swish_act", False))
    height, width, *channels = case["shape"]
    assert config == models.ModelConfig(
        case["net"],
        image_shape=(*(channels or [1]), height, width),
        num_filters=case["kw"]["num_filters"],
        label_size=case.get("classes", 1) if flags.get("cclass") else 0,
        spec_norm=flags.get("spec_norm", True),
        use_attention=flags.get("use_attention", False),
        swish_act=flags.get("swish_act", False),
    )


@pytest.mark.parametrize(
    "kind", [AisSettings, CombineSettings, DemoSettings, InceptionSettings, SampleSettings, SandboxSettings]
)
def test_flags_for_what_variables_do_not_show(kind):
    """Breaks when a script drops a flag by which a TF1 checkpoint was trained, so that its energies are others."""
    words = ["--spec_iter=3", "--spec_norm_val=2", "--downsample", "--swish_act"]
    settings = cli.parse(["script.py", *words], kind)
    config = open_model(REAL["dsprites_cond_pos"], torch.device("cpu"), settings, ema=False).model.config
    assert (config.spec_iter, config.spec_norm_val, config.downsample, config.swish_act) == (3, 2.0, True, True)


def test_energies_by_such_flags():
    """Breaks when the number of power iterations or the spectral norm does not reach the weights of a TF1 network."""
    case, variables, x, _, _ = recipe.load(GOLDEN / "resnet32_speciter3_val2.npz")
    flags = json.loads(str(case["config"]))["flags"]  # spec_iter and spec_norm_val
    slots = {f"{name}/Adam": variables[str(name)] for name in case["grad_cd_names"]}
    config = checkpoint.infer_config(variables | slots, **flags)
    model = build_network(variables=variables, **{"net" if k == "network" else k: v for k, v in vars(config).items()})
    assert_close(model(to_ours(x)).detach(), case["energy"])


def test_infer_conditional_mnist():
    """Breaks when the label planes in the first convolution are not counted."""
    variables, _ = variables_of("mnist")
    variables["context_0/c1_pre/cweight"] = np.zeros((3, 3, 11, 64), np.float32)
    assert checkpoint.infer_config(variables).label_size == 10


def test_infer_without_optimizer():
    """Breaks when a checkpoint without moments is not told by what training has moved away from zero."""
    variables, _ = variables_of("resnet32large_attention", slots=False)
    assert not checkpoint.infer_config(variables).use_attention
    variables["context_0/atten/gamma"] = np.array([0.1], np.float32)
    assert checkpoint.infer_config(variables).use_attention


def test_label_size_overrules():
    """Breaks when one class cannot be told from none by the user."""
    variables, _ = variables_of("dsprites", slots=False)
    assert checkpoint.infer_config(variables).label_size == 0
    assert checkpoint.infer_config(variables, label_size=1).label_size == 1
    with pytest.raises(UsageError, match=r"label_size=3 comes closest, but there is no .*shape"):
        checkpoint.infer_config(variables, label_size=3)
    with pytest.raises(UsageError, match="label_size is -1"):
        checkpoint.infer_config(variables, label_size=-1)


@pytest.mark.parametrize("slots", [True, False])
@pytest.mark.parametrize(
    ("network", "num_filters"), [("ResNet32Large", 128), ("ResNet32Larger", 128), ("ResNet32Wider", 192)]
)
def test_infer_published_widths(network, num_filters, slots):
    """Breaks when networks are confused whose variables agree at this very width (Wider's stem is 128 wide)."""
    config = models.ModelConfig(network, (3, 32, 32), num_filters)
    with torch.device("meta"):
        model = models.EnergyNetwork(config)
    shapes = {
        checkpoint.to_tf_name(name): checkpoint.to_tf_shape(name, tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
    }
    if slots:
        shapes |= {f"{checkpoint.to_tf_name(name)}/Adam": () for name, _ in model.named_parameters()}
    variables = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    assert checkpoint.infer_config(variables) == config


def test_no_network_matches():
    """Breaks when a checkpoint of something else is taken, or the message does not say what is missing."""
    variables, _ = variables_of("resnet32larger")
    del variables["context_0/res_8b_res_c2/g"]
    with pytest.raises(UsageError, match=r"ResNet32Larger with num_filters=8 .*no context_0/res_8b_res_c2/g of shape"):
        checkpoint.infer_config(variables)  # though it has all of ResNet32Large
    variables, _ = variables_of("resnet32larger")
    variables["context_0/res_9_res_c1/cweight/Adam"] = variables["context_0/c1_pre/cweight"]
    with pytest.raises(UsageError, match="there is a trained context_0/res_9_res_c1/cweight besides"):
        checkpoint.infer_config(variables)
    with pytest.raises(UsageError, match="none of MnistNet, DspritesNet"):
        checkpoint.infer_config({"context_0/c1/cweight": np.zeros(3, np.float32)})


# ---------------------------------------------------------------------------------------------------------------------
# A small writer of the format


def masked_crc(data):
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF


def number(field, value):
    return encode_varint(field << 3) + encode_varint(value)


def make_block(pairs, compression=0, interval=3, stretch=0):
    """Return a block of sorted (key, value) pairs with its trailer; every `interval`-th key is written in full.

    stretch: added to the length of each value.
    """
    content, restarts, last = b"", [], b""
    for i, (key, value) in enumerate(pairs):
        shared = 0
        if i % interval == 0:
            restarts.append(len(content))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        content += (
            encode_varint(shared)
            + encode_varint(len(key) - shared)
            + encode_varint(len(value) + stretch)
            + key[shared:]
            + value
        )
        last = key
    content += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
    return seal(content, compression)


def seal(content, compression=0):
    return content + bytes([compression]) + struct.pack("<I", masked_crc(content + bytes([compression])))


def make_table(pairs, block_length=4, **options):
    """Return a table of (key, value) pairs, `block_length` to a block."""
    table, places = b"", []
    for i in range(0, len(pairs), block_length):
        block = make_block(pairs[i : i + block_length], **options)
        places.append((pairs[i : i + block_length][-1][0], encode_varint(len(table)) + encode_varint(len(block) - 5)))
        table += block
    index = make_block(places)
    footer = encode_varint(0) + encode_varint(0) + encode_varint(len(table)) + encode_varint(len(index) - 5)
    return table + index + footer.ljust(40, b"\0") + tensorflow.MAGIC


def make_entry(array, shard, offset, *, dtype=None, shape=None, extra=b""):
    dtype = dtype or {"float32": 1, "float64": 2, "int32": 3, "int64": 9}[array.dtype.name]
    shape = b"".join(encode_field(2, number(1, size)) for size in (array.shape if shape is None else shape))
    places = number(3, shard) + number(4, offset) + number(5, array.nbytes)
    crc = encode_varint(6 << 3 | 5) + struct.pack("<I", masked_crc(array.tobytes()))
    return number(1, dtype) + encode_field(2, shape) + places + crc + extra


def write(prefix, variables, shards=1, edit=None, header=b"", gap=0, **options):
    """Write a checkpoint; `edit` may change the list of (key, entry) before the table is made of it."""
    data = [b"?" * gap] * shards
    pairs = [(b"", number(1, shards) + header)]
    for i, (name, array) in enumerate(sorted(variables.items())):
        pairs.append((name.encode(), make_entry(array, i % shards, len(data[i % shards]))))
        data[i % shards] += array.tobytes() + b"?" * gap
    pairs = edit(pairs) if edit else pairs
    pathlib.Path(f"{prefix}.index").write_bytes(make_table(pairs, **options))
    for i, content in enumerate(data):
        pathlib.Path(f"{prefix}.data-{i:05d}-of-{shards:05d}").write_bytes(content)


SMALL = {
    "context_0/c1/cweight": np.arange(24, dtype=np.float32).reshape(2, 3, 1, 4),
    "context_0/c1/cweight/Adam": np.full((2, 3), np.pi),
    "context_0/c2/b": np.array([-1, 2**31 - 1], np.int32),
    "context_0/c2/g": np.array([[1.5]], np.float32),
    "global_step": np.array(2**40),
    "x": np.array([7, 8, 9], np.float32),
}


@pytest.mark.parametrize(("shards", "gap"), [(1, 0), (1, 5), (3, 0)])
def test_round_trip(tmp_path, shards, gap):
    """Breaks when shared prefixes, blocks, shards, gaps between tensors, scalars or other types are misread."""
    write(tmp_path / "model_1", SMALL, shards=shards, gap=gap)
    variables = tensorflow.read_tf_checkpoint(tmp_path / "model_1")
    assert set(variables) == set(SMALL)
    for name, array in SMALL.items():
        np.testing.assert_array_equal(variables[name], array, strict=True)


def replace(key, **fields):
    """Return an edit that rewrites one entry with other fields."""
    fields = {"array": SMALL[key.decode()], "shard": 0, "offset": 0} | fields
    return lambda pairs: [(name, make_entry(**fields) if name == key else entry) for name, entry in pairs]


NOTHING, LONG_NUMBER = np.zeros(0, np.float32), bytes([3 << 3]) + b"\x80" * 20 + b"\0"
BAD_TABLES = {
    "compressed": ({"compression": 1}, r"\.index is compressed"),
    "big-endian": ({"header": number(2, 1)}, r"\.index was written in big-endian"),
    "no header": ({"edit": lambda pairs: pairs[1:]}, r"\.index is damaged: it has no header"),
    "no names": ({"edit": lambda pairs: pairs[:1], "interval": 1000}, None),
    "unsorted": ({"edit": lambda pairs: [pairs[0], *pairs[:0:-1]]}, r"\.index is damaged: its names are not in order"),
    "twice": ({"edit": lambda pairs: [*pairs, pairs[-1]]}, r"\.index is damaged: its names are not in order"),
    "not ascii": (
        {"edit": lambda pairs: [*pairs, (b"\xff\n", pairs[1][1])]},
        r"\.index is damaged: an impossible name",
    ),
    "long name": ({"edit": lambda pairs: [*pairs, (b"y" * 2000, pairs[1][1])]}, r"\.index .* impossible name"),
    "string": ({"edit": replace(b"x", dtype=7)}, r"\.index holds x of TensorFlow's type 7"),
    "slices": ({"edit": replace(b"x", extra=encode_field(7, b""))}, r"\.index holds x in slices"),
    "shape": ({"edit": replace(b"x", shape=(4,))}, r"\.index is damaged: x of shape \(4,\) in 12 bytes"),
    "huge shape": ({"edit": replace(b"x", shape=(2**62, 2**62))}, r"\.index is damaged: x of shape"),
    "negative": ({"edit": replace(b"x", shape=(2**64 - 1,))}, r"\.index is damaged: x of shape"),
    "empty": ({"edit": replace(b"x", array=NOTHING, shape=(0, 2**40, 2**40))}, r"\.index is damaged: x of shape"),
    "dimensions": ({"edit": replace(b"x", shape=(3,) + (1,) * 100_000)}, r"\.index is damaged: x of 100001 dim"),
    "long number": ({"edit": replace(b"x", extra=LONG_NUMBER)}, r"\.index is damaged: a number in it does not end"),
    "stretched": ({"stretch": 4, "block_length": 1}, r"\.index is damaged: something in it reaches beyond"),
    "overlap": ({"edit": replace(b"x", offset=4)}, r"\.index is damaged: .* overlap"),
    "beyond": ({"edit": replace(b"x", offset=2**62)}, r"\.data-00000-of-00001 is truncated: x reaches beyond"),
    "no shard": ({"edit": replace(b"x", shard=5)}, r"\.data-00005-of-00001 is missing"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_forged(tmp_path, name):
    """Breaks when a file whose checksums are right, but whose content is not, is trusted."""
    options, expected = BAD_TABLES[name]
    write(tmp_path / "model_1", SMALL, **options)
    if expected is None:
        assert tensorflow.read_tf_checkpoint(tmp_path / "model_1") == {}
        return
    with pytest.raises(UsageError, match=expected) as caught:
        tensorflow.read_tf_checkpoint(tmp_path / "model_1")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_wrong_files(tmp_path):
    """Breaks when a missing, foreign, huge or unreadable file is not named."""
    prefix = tmp_path / "model_1"
    index, data = tmp_path / "model_1.index", tmp_path / "model_1.data-00000-of-00001"
    for content, expected in (
        (None, "is missing"),
        (b"", "is not the index"),
        (b"x" * 1000, "is not the index"),
        (b"x" * (2 << 20), "has more than"),
    ):
        if content is not None:
            index.write_bytes(content)
        with pytest.raises(UsageError, match=rf"model_1\.index {expected}"):
            tensorflow.read_tf_checkpoint(prefix)
    write(prefix, SMALL)
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"data-00000-of-00001 is truncated: x reaches"):
        tensorflow.read_tf_checkpoint(prefix)
    data.unlink()
    with pytest.raises(UsageError, match=r"data-00000-of-00001 is missing"):
        tensorflow.read_tf_checkpoint(prefix)


# ---------------------------------------------------------------------------------------------------------------------
# Random damage


def damage(content, rng):
    """Return the bytes with one to eight of them changed, or cut short, or with a stretch zeroed or doubled."""
    content = bytearray(content)
    kind = rng.random()
    start = rng.randrange(len(content))
    if kind < 0.7:
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
    elif kind < 0.85:
        del content[start:]
    elif kind < 0.95:
        content[start : start + 64] = bytes(len(content[start : start + 64]))
    else:
        content[start:start] = content[start : start + 64]
    return bytes(content)


@pytest.mark.parametrize("suffix", ["index", "data-00000-of-00001"])
@real
def test_random_damage(tmp_path, name, suffix):
    """Breaks when damage gives anything but one line or the right tensors."""
    right = tensorflow.read_tf_checkpoint(REAL[name])
    shutil.copytree(REAL[name].parent, tmp_path, dirs_exist_ok=True)
    target = pathlib.Path(f"{tmp_path / REAL[name].name}.{suffix}")
    intact = target.read_bytes()
    rng, refused = random.Random(0), 0
    for _ in range(250):
        target.write_bytes(damage(intact, rng))
        try:
            variables = tensorflow.read_tf_checkpoint(tmp_path / REAL[name].name)
        except UsageError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert set(variables) == set(right)
            assert all(variables[key].tobytes() == right[key].tobytes() for key in right)
            assert all(variables[key].shape == right[key].shape for key in right)
    assert refused > 200  # the rest hit bytes without meaning


@real
def test_random_forgery(tmp_path, name):
    """Breaks when damage behind a correct checksum raises anything else, or invents the content of a tensor."""
    right = {array.tobytes() for array in tensorflow.read_tf_checkpoint(REAL[name]).values()}
    data = pathlib.Path(f"{REAL[name]}.data-00000-of-00001").read_bytes()
    (tmp_path / "model_1.data-00000-of-00001").write_bytes(data)
    pairs = list(tensorflow.read_table(pathlib.Path(f"{REAL[name]}.index").read_bytes()))
    rng = random.Random(1)
    for _ in range(250):
        forged = list(pairs)
        i = rng.randrange(len(forged))
        key, value = forged[i]
        forged[i] = (key, damage(value, rng)) if rng.random() < 0.8 else (damage(key or b"x", rng), value)
        table = make_table(forged, block_length=32, interval=16)
        if rng.random() < 0.5:  # and the pairs' lengths
            block = make_block(forged, interval=16)
            block = seal(damage(block[:-5], rng))
            index = make_block([(b"z", encode_varint(0) + encode_varint(len(block) - 5))])
            footer = encode_varint(0) + encode_varint(0) + encode_varint(len(block)) + encode_varint(len(index) - 5)
            table = block + index + footer.ljust(40, b"\0") + tensorflow.MAGIC
        (tmp_path / "model_1.index").write_bytes(table)
        try:
            variables = tensorflow.read_tf_checkpoint(tmp_path / "model_1")
        except UsageError as error:
            assert "\n" not in str(error)
        else:
            assert {array.tobytes() for array in variables.values()} <= right


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer, and conversion


def trained_checkpoint(prefix, steps):
    """Write the dSprites checkpoint with random moments and the counters of `steps` steps; return its variables."""
    variables = tensorflow.read_tf_checkpoint(REAL["dsprites_cond_pos"])
    rng = np.random.RandomState(0)
    for name, array in variables.items():
        if name.endswith(("/Adam", "/Adam_1")):
            variables[name] = rng.uniform(0, 1, array.shape).astype(np.float32)
    power = np.float32(0.999)
    for _ in range(steps):
        power *= np.float32(0.999)
    variables["beta2_power"] = np.asarray(power)
    write(prefix, variables)
    return variables


def test_moments(tmp_path):
    """Breaks when moments are swapped, not brought into our layout, or the count of steps is off."""
    variables = trained_checkpoint(tmp_path / "model_7", steps=1000)
    model = checkpoint.load_tf_energy(tmp_path / "model_7")
    moments, steps = checkpoint.read_adam_moments(model, variables)
    assert steps == 1000
    assert set(moments) == {name for name, _ in model.named_parameters()}
    first, second = moments["stages.c2.weight"]
    np.testing.assert_array_equal(first.permute(2, 3, 1, 0), variables["context_0/c2/cweight/Adam"])
    np.testing.assert_array_equal(second.permute(2, 3, 1, 0), variables["context_0/c2/cweight/Adam_1"])

    del variables["context_0/c3/gb/Adam_1"]
    with pytest.raises(UsageError, match="lacks context_0/c3/gb/Adam_1"):
        checkpoint.read_adam_moments(model, variables)
    for power in (np.array(1.5), np.array(-0.5), np.array(np.nan), np.zeros(2)):
        with pytest.raises(UsageError, match="no beta2_power"):
            checkpoint.read_adam_moments(model, {"beta2_power": power})
    with pytest.raises(UsageError, match="no beta2_power"):
        checkpoint.read_adam_moments(model, {})


@pytest.mark.parametrize(
    ("power", "steps"), [(1.0, 0), (0.999, 0), (0.998001, 1), (0.999**8001, 8000), (0.0, 87_292), (1e-42, 87_292)]
)
def test_step_count(power, steps):
    """Breaks when the count is off by one, or an underflown power is an error."""
    variables = tensorflow.read_tf_checkpoint(REAL["dsprites_cond_pos"])
    variables["beta2_power"] = np.array(power, np.float32)
    model = checkpoint.load_tf_energy(REAL["dsprites_cond_pos"])
    assert checkpoint.read_adam_moments(model, variables)[1] == steps


def test_convert(tmp_path, capsys):
    """Breaks when a converted checkpoint differs from the original in network, moments or iteration."""
    variables = trained_checkpoint(tmp_path / "model_7", steps=30)
    target = tmp_path / "ours" / "model_7.pt"
    target.parent.mkdir()
    assert convert_checkpoint.main(["--swish_act", str(tmp_path / "model_7"), str(target)]) == 0
    printed = capsys.readouterr().out
    assert "DspritesNet" in printed and "context_0/c2/cweight" in printed and "(4, 4, 8, 16)" in printed

    original = checkpoint.load_tf_energy(tmp_path / "model_7", swish_act=True)
    converted = checkpoint.load_energy(target)
    assert converted.config == original.config
    assert dataclasses.asdict(converted.config)["swish_act"]
    images, labels = torch.rand(2, 1, 64, 64), torch.rand(2, 2)
    assert torch.equal(converted(images, labels), original(images, labels))

    state = checkpoint.load(target)
    assert state["iteration"] == 7
    optimizer = ClippedAdam(converted.parameters())
    optimizer.load_state_dict(state["optimizer"])
    assert optimizer.param_groups[0]["t"] == 30
    parameter = dict(converted.named_parameters())["stages.fc_dense.weight"]
    np.testing.assert_array_equal(optimizer.state[parameter]["m"].T, variables["context_0/fc_dense/wweight/Adam"])
    np.testing.assert_array_equal(optimizer.state[parameter]["v"].T, variables["context_0/fc_dense/wweight/Adam_1"])


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (REAL["cifar10_cond"].with_name("model_1"), "model_1.pt", "model_1.index is missing"),
        ("model_2", "model_2.pt", "model_2: no convolution context_0/c1/cweight"),
        (REAL["cifar10_cond"], "model_2.index/model_1.pt", "model_1.pt cannot be written"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, capsys, source, target, expected):
    """Breaks when a mistake is a traceback, or takes another exit status."""
    write(tmp_path / "model_2", {"x": SMALL["x"]})
    assert convert_checkpoint.main([str(tmp_path / source), str(tmp_path / target)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and expected in message and message.count("\n") == 1
