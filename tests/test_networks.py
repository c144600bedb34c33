"""The networks beside TF-Slim's own values, names and published figures."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from hubbeam.modules.checkpoints import open_checkpoint
from hubbeam.modules.errors import ConfigError
from hubbeam.modules.networks.layers import Layers, Norm, VariableSpec, round_to_multiple
from hubbeam.modules.networks.registry import Built, Network

HALF = {"depth_multiplier": 0.5}
CHECKPOINTS = {
    "mobilenet_v2_050_160": Network("mobilenet_v2", HALF, image_size=160),
    "inception_v2": Network("inception_v2", image_size=224, num_classes=1001),
    "nasnet_mobile": Network("nasnet_mobile", image_size=224, num_classes=1001),
    "mobilenet_v1_100_160": Network("mobilenet_v1", image_size=160, num_classes=1001),
}


def run(network: Network, values: dict[str, np.ndarray], images: np.ndarray) -> Built:
    variables = {name: tf.constant(value) for name, value in values.items()}
    return network.build(tf.constant(images), lambda spec: variables[spec.name])


def multiply_adds(graph: tf.Graph) -> int:
    """Counts the multiplications of all convolutions and matrix products, for one image."""
    total = 0
    for op in graph.get_operations():
        if op.type in ("Conv2D", "DepthwiseConv2dNative"):
            _, height, width, _ = op.outputs[0].shape
            total += height * width * math.prod(op.inputs[1].shape)
        elif op.type == "MatMul":
            total += math.prod(op.inputs[1].shape)
    return total


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_agrees_with_tf_slim(name: str, shared: Path) -> None:
    network = CHECKPOINTS[name]
    folder = shared / "checkpoints" / name
    listed = dict(line.split("\t") for line in (folder / "variables.txt").read_text().splitlines())
    shapes = {n: spec.shape for n, spec in network.variables.items()}
    assert {n: str(list(shape)) for n, shape in shapes.items()} == listed

    expected = np.load(folder / "expected.npz")
    with open_checkpoint(folder / "model.ckpt") as checkpoint:
        values = checkpoint.read(shapes)
    built = run(network, values, expected["images"] / np.float32(255))
    scale = np.abs(expected["features"]).max()
    np.testing.assert_allclose(built.features, expected["features"], rtol=1e-4, atol=1e-5 * scale)
    if name == "mobilenet_v2_050_160":
        assert built.logits is None
        assert np.abs(built.features - expected["features"]).max() < 1e-4
    else:
        scale = np.abs(expected["logits"]).max()
        np.testing.assert_allclose(built.logits, expected["logits"], rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("builder", "args", "size", "width", "millions", "madds"),
    [
        # The MobileNet V2 release's table, the MobileNet V1 paper's tables 6 to 8 and release, the
        # NASNet paper's table 3, and the Inception V2 figures of the MobileNet and NASNet papers.
        ("mobilenet_v2", HALF, 224, 1280, 1.95, 97),
        ("mobilenet_v2", HALF, 160, 1280, 1.95, 50),
        ("mobilenet_v2", {"depth_multiplier": 0.35}, 96, 1280, 1.66, 11),
        ("mobilenet_v2", {"depth_multiplier": 1.0}, 224, 1280, 3.47, 300),
        ("mobilenet_v2", {"depth_multiplier": 1.4}, 224, 1792, 6.06, 582),
        ("mobilenet_v1", {"depth_multiplier": 1.0}, 160, 1024, 4.24, 291),
        ("mobilenet_v1", {"depth_multiplier": 0.25}, 128, 256, 0.47, 14),
        ("inception_v2", {}, 224, 1024, 11.2, 1940),
        ("nasnet_mobile", {}, 224, 1056, 5.3, 564),
    ],
)
def test_published_figures(
    builder: str, args: dict[str, Any], size: int, width: int, millions: float, madds: float
) -> None:
    network = Network(builder, args, image_size=size, num_classes=1001)
    specs, graph, _ = network.declare()
    parameters = sum(math.prod(s.shape) for s in specs.values() if s.trainable)
    assert parameters / 1e6 == pytest.approx(millions, rel=0.015)
    # The tables round or cut to millions, the NASNet paper (1.94 B) to three digits.
    assert abs(multiply_adds(graph) / 1e6 - madds) < max(1, 0.003 * madds)
    assert network.width == width


def test_channels_are_multiples_of_8() -> None:
    assert [round_to_multiple(c) for c in (3, 8, 11.2, 12, 16.8, 22.4, 44.8, 67.2)] == [
        8, 8, 16, 16, 16, 24, 48, 64,
    ]  # fmt: skip
    for multiplier in (0.1, 0.35, 0.75, 1.3):
        args = {"depth_multiplier": multiplier}
        specs = Network("mobilenet_v2", args, image_size=96).variables
        convolutions = [s.shape for n, s in specs.items() if n.endswith("/weights")]
        assert all(shape[-1] % 8 == 0 for shape in convolutions)
        assert convolutions[-1][-1] >= 1280


@pytest.mark.parametrize("size", [96, 100, 192])
def test_any_input_size(size: int) -> None:
    network = Network("mobilenet_v2", HALF, image_size=size)
    last = network.declare().built.end_points["MobilenetV2/layer_19"]
    side = math.ceil(size / 32)
    assert last.shape[1:] == [side, side, 1280]


def test_end_points_are_tf_slims() -> None:
    def names(builder: str) -> dict[str, list[int]]:
        found = Network(builder, image_size=224).declare().built.end_points
        return {name: t.shape.as_list()[1:] for name, t in found.items()}

    inception = names("inception_v2")
    assert [n.removeprefix("InceptionV2/") for n in inception] == [
        "Conv2d_1a_7x7", "MaxPool_2a_3x3", "Conv2d_2b_1x1", "Conv2d_2c_3x3", "MaxPool_3a_3x3",
        "Mixed_3b", "Mixed_3c", "Mixed_4a", "Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e",
        "Mixed_5a", "Mixed_5b", "Mixed_5c", "AvgPool_1a",
    ]  # fmt: skip
    assert inception["InceptionV2/Mixed_5c"] == [7, 7, 1024]
    nasnet = names("nasnet_mobile")
    assert list(nasnet) == [
        "Stem", "Cell_0", "Cell_1", "Cell_2", "Cell_3", "Reduction_Cell_0", "Cell_4", "Cell_5",
        "Cell_6", "Cell_7", "Reduction_Cell_1", "Cell_8", "Cell_9", "Cell_10", "Cell_11",
        "global_pool",
    ]  # fmt: skip
    assert nasnet["Stem"] == [28, 28, 88]
    assert nasnet["Cell_11"] == [7, 7, 1056]


def path_dropouts(graph: tf.Graph) -> list[float]:
    divisors = [op.inputs[1] for op in graph.get_operations() if op.type == "RealDiv"]
    return [float(tf.get_static_value(t)) for t in divisors]


def test_nasnet_path_dropout_grows_with_depth() -> None:
    network = Network("nasnet_mobile", {"drop_path_keep": 0.7}, image_size=64)
    found = path_dropouts(network.declare(training=True).graph)
    # All but "none": 9 operations in each of 4 reduction cells, 8 in each of 12 normal cells.
    assert len(found) == 4 * 9 + 12 * 8
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 16
    assert found[0] == pytest.approx(1 - 0.3 / 16)
    assert found[-1] == pytest.approx(0.7)


def test_nasnet_training_graph_has_the_auxiliary_classifier() -> None:
    args = {"auxiliary": True}
    network = Network("nasnet_mobile", args, image_size=224, num_classes=1001)
    trained, graph, built = network.declare(training=True)
    inference = network.declare(training=False).variables
    added = {name: spec.shape for name, spec in trained.items() if name not in inference}
    assert all(name.startswith("aux_7/aux_logits/") for name in added)
    assert added["aux_7/aux_logits/proj/weights"] == (1, 1, 528, 128)
    assert added["aux_7/aux_logits/Conv/weights"] == (4, 4, 128, 768)
    assert added["aux_7/aux_logits/FC/weights"] == (768, 1001)
    assert len(added) == 3 + 2 * 4 + 1
    assert inference.keys() < trained.keys()
    assert built.end_points["AuxLogits"].shape[1:] == [1001]
    assert path_dropouts(graph) == []  # TF-Slim trained the mobile network without


def layers(training: bool) -> tuple[Layers, dict[str, tf.Variable]]:
    made: dict[str, tf.Variable] = {}

    def variable(spec: VariableSpec) -> tf.Variable:
        return made.setdefault(spec.name, tf.Variable(tf.fill(spec.shape, spec.fill)))

    return Layers(variable, training=training), made


def test_batch_norm_in_training_uses_and_moves_statistics() -> None:
    x = np.random.default_rng(0).normal(3.0, 2.0, (4, 5, 5, 6)).astype(np.float32)
    built, variables = layers(training=True)
    built.norm = Norm(epsilon=0.01, decay=0.9, scale=True)
    y = built.batch_norm(tf.constant(x), name="n")
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(variance + 0.01), atol=1e-5)
    np.testing.assert_allclose(variables["n/moving_mean"], 0.1 * mean, rtol=1e-5)
    unbiased = variance * 100 / 99
    np.testing.assert_allclose(variables["n/moving_variance"], 0.9 + 0.1 * unbiased, rtol=1e-5)

    fixed, variables = layers(training=False)
    fixed.norm = Norm(epsilon=0.01)
    y = fixed.batch_norm(tf.constant(x), name="n")
    np.testing.assert_allclose(y, x / np.sqrt(1.01), rtol=1e-5)
    assert fixed.updates == []
    np.testing.assert_array_equal(variables["n/moving_mean"], 0.0)


def test_dropout_and_drop_path() -> None:
    x = tf.ones([200, 2, 2, 3])
    training, _ = layers(training=True)
    dropped = training.drop_path(x, 0.75).numpy()
    per_example = dropped.reshape(200, -1)
    assert (per_example == per_example[:, :1]).all()  # whole examples
    assert set(np.unique(dropped)) == {0.0, np.float32(1) / np.float32(0.75)}
    assert 0.55 < (per_example[:, 0] > 0).mean() < 0.95
    elements = training.dropout(x, 0.5).numpy()
    assert set(np.unique(elements)) == {0.0, 2.0}
    inference, _ = layers(training=False)
    assert inference.drop_path(x, 0.75) is x
    assert inference.dropout(x, 0.5) is x


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="no network is named 'resnet'; there are inception_v2"):
        Network("resnet", image_size=224)
    with pytest.raises(ConfigError, match="takes no argument depth; it takes depth_multiplier"):
        Network("mobilenet_v2", {"depth": 2}, image_size=224)
    with pytest.raises(ConfigError, match="no graph for training"):
        Network("mobilenet_v1", image_size=160, quantops=True).declare(training=True)
