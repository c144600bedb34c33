"""MobileNet V1 and its quantised form, beside TF-Slim's own values and published uint8 models."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tensorflow as tf

from hubbeam.modules import tflite
from hubbeam.modules.build import build_module, network_of, untrained_values
from hubbeam.modules.engines.tensorflow import FrozenGraph, freeze
from hubbeam.modules.errors import ConfigError
from hubbeam.modules.images import decode
from hubbeam.modules.networks.layers import Layers, Outputs, VariableSpec
from hubbeam.modules.networks.mobilenet_v1 import mobilenet_v1
from hubbeam.modules.networks.quantize import QuantizedLayers
from hubbeam.modules.networks.registry import Network
from hubbeam.modules.presets import load_preset
from hubbeam.modules.spec import CLASSES, load_spec
from hubbeam.modules.store import resolve_folder

QUANTOPS = "mobilenet_v1_100_160_quantops"
QUANT = "checkpoints/mobilenet_v1_quant"
CLASSIFIER = f"{QUANT}/mobilenet_v1_0.5_160_quant.tflite"
EXTRACTOR = f"{QUANT}/mobilenet_v1_1.0_224_quant_embedding_extractor.tflite"


def values_of(model: tflite.TfliteModel) -> dict[str, np.ndarray]:
    """Turns a uint8 MobileNet V1 into the variables of our quantised network.

    The batch norm that was folded cannot be got back: it becomes one that changes nothing.
    """
    values: dict[str, np.ndarray] = {}
    for operator in model.operators:
        if operator.name not in ("CONV_2D", "DEPTHWISE_CONV_2D"):
            continue
        weights, biases = (model.tensors[i] for i in operator.inputs[1:3])
        output = model.tensors[operator.outputs[0]]
        operations = weights.name.split("/weights_quant")[0].split(";")[-1]
        if operations == weights.name:
            raise ValueError(f"no weights_quant in {weights.name}")
        scope = operations.replace("MobilenetV1/MobilenetV1/", "MobilenetV1/")
        assert weights.value is not None
        assert biases.value is not None
        [scale], [zero] = weights.scale, weights.zero_point
        # [out, h, w, in] to [h, w, in, out], or [1, h, w, out] to [h, w, out, 1].
        kernel = ((weights.value.astype(np.float64) - zero) * scale).transpose(1, 2, 3, 0)
        bias = biases.value * biases.scale[0]
        one = np.ones_like(bias)
        if operator.name == "CONV_2D":
            values[f"{scope}/weights"] = kernel
        else:
            values[f"{scope}/depthwise_weights"] = kernel
        if "/Logits/" in scope:
            values[f"{scope}/biases"] = bias
        else:
            norm = f"{scope}/BatchNorm"
            values[f"{norm}/gamma"] = one
            values[f"{norm}/beta"] = bias
            values[f"{norm}/moving_mean"] = 0 * one
            values[f"{norm}/moving_variance"] = one - 0.001
        for name, tensor, lowest in (("weights", weights, 1), ("act", output, 0)):
            [scale], [zero] = tensor.scale, tensor.zero_point
            values[f"{operations}/{name}_quant/min"] = np.array((lowest - zero) * scale)
            values[f"{operations}/{name}_quant/max"] = np.array((255 - zero) * scale)
    return {name: value.astype(np.float32) for name, value in values.items()}


def build(
    make: type[Layers],
    values: Callable[[VariableSpec], np.ndarray],
    size: int,
    **kwargs: Any,
) -> tuple[FrozenGraph, FrozenGraph | None]:
    """Builds the network in a graph of constants; returns it up to features and to logits."""

    def constant(spec: VariableSpec) -> Any:
        value = values(spec)
        assert value.shape == spec.shape, spec
        return tf.constant(value, tf.float32)

    with tf.Graph().as_default() as graph:
        images = tf.compat.v1.placeholder(tf.float32, [None, size, size, 3], "images")
        outputs: Outputs = mobilenet_v1(make(constant), images, **kwargs)
        definition = graph.as_graph_def()
    features = FrozenGraph(definition, images.name, outputs.features.name)
    if outputs.logits is None:
        return features, None
    return features, FrozenGraph(definition, images.name, outputs.logits.name)


def run(frozen: FrozenGraph, images: np.ndarray) -> np.ndarray:
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(frozen.graph_def, name="")
    with tf.compat.v1.Session(graph=graph) as session:
        parts = [
            session.run(frozen.output, {frozen.input: images[i : i + 20]})
            for i in range(0, len(images), 20)
        ]
    return np.concatenate(parts)


def interpret(model: bytes, images: np.ndarray, tensor: int | None = None) -> np.ndarray:
    """Runs a TFLite model picture by picture; returns real values of its output (or `tensor`)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        interpreter = tf.lite.Interpreter(
            model_content=model, experimental_preserve_all_tensors=tensor is not None
        )
    interpreter.allocate_tensors()
    [source] = interpreter.get_input_details()
    details = {d["index"]: d for d in interpreter.get_tensor_details()}
    index = interpreter.get_output_details()[0]["index"] if tensor is None else tensor
    scale, zero = details[index]["quantization"]
    found = []
    for image in images:
        interpreter.set_tensor(source["index"], image[np.newaxis])
        interpreter.invoke()
        value = interpreter.get_tensor(index).reshape(-1)
        found.append(value if scale == 0 else (value.astype(np.float32) - zero) * scale)
    return np.array(found)


def pictures(files: list[Path], size: int) -> np.ndarray:
    """Reads pictures as TF-Slim evaluated its networks, rounded to uint8."""
    preset = load_preset("slim_eval")
    pixels = np.empty((len(files), size, size, 3), preset.dtype)
    for file, out in zip(files, pixels, strict=True):
        decode(file.read_bytes(), preset, [out])
    return np.round(pixels * 255).astype(np.uint8)


def as_seen(pixels: np.ndarray) -> np.ndarray:
    """Gives the graph the numbers that a uint8 model sees: 2x - 1 = (q - 128) / 128."""
    return pixels / np.float32(256)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


class Published:
    """A published uint8 model and our quantised network with its ranges and folded weights."""

    def __init__(self, file: Path, files: list[Path], size: int, **kwargs: Any):
        self.data = file.read_bytes()
        self.model = tflite.read_tflite(self.data)
        self.values = values_of(self.model)
        self.size = (size, size)
        self.pixels = pictures(files, size)
        self.used: list[str] = []

        def value(spec: VariableSpec) -> np.ndarray:
            self.used.append(spec.name)
            return self.values[spec.name]

        self.features, self.logits = build(QuantizedLayers, value, size, **kwargs)

    def output_of(self, kind: str) -> int:
        return [o.outputs[0] for o in self.model.operators if o.name == kind][-1]


@pytest.fixture(scope="module")
def classifier(shared: Path, labelled: list[Path]) -> Published:
    return Published(shared / CLASSIFIER, labelled, 160, depth_multiplier=0.5, num_classes=1001)


@pytest.fixture(scope="module")
def extractor(shared: Path, labelled: list[Path]) -> Published:
    return Published(shared / EXTRACTOR, labelled[::5], 224)


def test_plain_network_equals_tf_slims(shared: Path) -> None:
    folder = shared / "checkpoints" / "mobilenet_v1_100_160"
    checkpoint = tf.train.load_checkpoint(str(folder / "model.ckpt"))
    left = set(checkpoint.get_variable_to_shape_map())

    def value(spec: VariableSpec) -> np.ndarray:
        left.remove(spec.name)
        return np.asarray(checkpoint.get_tensor(spec.name))

    features, logits = build(Layers, value, 160, num_classes=1001)
    assert logits is not None
    assert not left
    expected = np.load(folder / "expected.npz")
    images = expected["images"] / np.float32(255)
    for frozen, wanted in ((features, expected["features"]), (logits, expected["logits"])):
        found = run(frozen, images)
        assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("multiplier", "first", "width"), [(0.25, 8, 256), (0.5, 16, 512), (0.35, 16, 360)]
)
def test_widths_are_multiples_of_eight(multiplier: float, first: int, width: int) -> None:
    shapes = {}

    def value(spec: VariableSpec) -> np.ndarray:
        shapes[spec.name] = spec.shape
        return np.zeros(spec.shape)

    build(Layers, value, 96, depth_multiplier=multiplier)
    assert shapes["MobilenetV1/Conv2d_0/weights"] == (3, 3, 3, first)
    assert shapes["MobilenetV1/Conv2d_13_pointwise/BatchNorm/beta"] == (width,)
    assert all(n % 8 == 0 for name, shape in shapes.items() for n in shape if "beta" in name)


def test_quantised_network_has_contrib_quantizes_variables() -> None:
    network = Network("mobilenet_v1", image_size=160, num_classes=1001, quantops=True)
    plain = Network("mobilenet_v1", image_size=160, num_classes=1001)
    added = {name: spec for name, spec in network.variables.items() if name not in plain.variables}
    assert plain.variables.keys() <= network.variables.keys()
    layers = [f"Conv2d_{i}_{part}" for i in range(1, 14) for part in ("depthwise", "pointwise")]
    scopes = [f"MobilenetV1/MobilenetV1/{layer}" for layer in ("Conv2d_0", *layers)]
    scopes.append("MobilenetV1/Logits/Conv2d_1c_1x1")
    assert set(added) == {
        f"{scope}/{kind}_quant/{end}"
        for scope in scopes
        for kind in ("weights", "act")
        for end in ("min", "max")
    }
    assert all(spec.shape == () and not spec.trainable for spec in added.values())


def test_quantised_network_cannot_be_trained() -> None:
    network = Network("mobilenet_v1", image_size=160, quantops=True)
    with pytest.raises(ConfigError, match="no graph for training"):
        network.declare(training=True)


def test_batch_norm_is_folded(shared: Path) -> None:
    """The checkpoint's random batch-norm statistics survive the folding and 8 bits."""
    folder = shared / "checkpoints" / "mobilenet_v1_100_160"
    checkpoint = tf.train.load_checkpoint(str(folder / "model.ckpt"))

    def folded(scope: str, kind: str) -> np.ndarray:
        kernel = checkpoint.get_tensor(f"{scope}/{kind}")
        gamma, variance = (
            checkpoint.get_tensor(f"{scope}/BatchNorm/{name}")
            for name in ("gamma", "moving_variance")
        )
        factor = gamma / np.sqrt(variance + 0.001)
        return kernel * (factor[:, None] if kind == "depthwise_weights" else factor)

    def value(spec: VariableSpec) -> np.ndarray:
        scope, _, leaf = spec.name.rpartition("/")
        if not scope.endswith("_quant"):
            return np.asarray(checkpoint.get_tensor(spec.name))
        if scope.endswith("act_quant"):
            return np.array(0.0 if leaf == "min" else 6.0)
        scope = scope.removesuffix("/weights_quant").replace("V1/MobilenetV1/", "V1/")
        kernel = folded(scope, "depthwise_weights" if "_depthwise" in scope else "weights")
        return np.array(min(kernel.min(), 0) if leaf == "min" else max(kernel.max(), 0))

    features, _ = build(QuantizedLayers, value, 160)
    expected = np.load(folder / "expected.npz")
    found = run(features, expected["images"] / np.float32(255))
    assert correlation(found, expected["features"]) > 0.98


def test_graph_agrees_with_published_classifier(classifier: Published) -> None:
    assert classifier.logits is not None
    assert set(classifier.used) == set(classifier.values)
    logits = classifier.output_of("CONV_2D")
    theirs = interpret(classifier.data, classifier.pixels, logits)
    ours = run(classifier.logits, as_seen(classifier.pixels))
    assert np.mean(ours.argmax(1) == theirs.argmax(1)) >= 0.98
    assert correlation(ours, theirs) > 0.995
    # Whatever differs is within one of their 256 levels.
    [level] = classifier.model.tensors[logits].scale
    chosen = np.take_along_axis(theirs, ours.argmax(1)[:, None], 1)[:, 0]
    assert np.mean(chosen >= theirs.max(1) - 1.01 * level) >= 0.99


def test_graph_agrees_with_published_extractor(extractor: Published) -> None:
    assert set(extractor.used) == set(extractor.values)
    theirs = interpret(extractor.data, extractor.pixels)
    ours = run(extractor.features, as_seen(extractor.pixels))
    assert correlation(ours, theirs) > 0.999


def test_each_layer_equals_the_integer_kernel(extractor: Published) -> None:
    """Fed with the interpreter's own numbers, layers differ but in sums on the edge of a level."""
    model = extractor.model
    tensors = [o.outputs[0] for o in model.operators if "CONV" in o.name]
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(extractor.features.graph_def, name="")
    ours = [o.outputs[0] for o in graph.get_operations() if "act_quant/FakeQuant" in o.name]
    assert len(tensors) == len(ours) == 27
    theirs = [interpret(extractor.data, extractor.pixels[:2], i) for i in tensors]
    differ = 0
    with tf.compat.v1.Session(graph=graph) as session:
        for i in range(1, 27):
            given = theirs[i - 1].reshape(2, *ours[i - 1].shape[1:])
            found = session.run(ours[i], {ours[i - 1]: given}).reshape(2, -1)
            steps = np.round(np.abs(found - theirs[i]) / model.tensors[tensors[i]].scale[0])
            assert steps.max() <= 1
            differ += int(np.count_nonzero(steps))
    assert differ < 1e-4 * sum(t.size for t in theirs)


@pytest.mark.parametrize("which", ["classifier", "extractor"])
def test_uint8_export_is_the_published_model(which: str, request: pytest.FixtureRequest) -> None:
    """Out of the graph comes what went in: the same integers, so the same results to the bit."""
    published: Published = request.getfixturevalue(which)
    frozen = published.logits or published.features
    data = tflite.convert(frozen, published.size, uint8=True)
    model = tflite.read_tflite(data)
    assert {t.dtype for t in model.tensors} == {"uint8", "int32"}
    by_kind: dict[str, list[tflite.TfliteOperator]] = {}
    for operator in model.operators:
        by_kind.setdefault(operator.name, []).append(operator)
    assert set(by_kind) == {"CONV_2D", "DEPTHWISE_CONV_2D", "AVERAGE_POOL_2D", "RESHAPE"}
    for kind in ("CONV_2D", "DEPTHWISE_CONV_2D"):
        theirs = [o for o in published.model.operators if o.name == kind]
        for mine, other in zip(by_kind[kind], theirs, strict=True):
            for a, b in zip(mine.inputs + mine.outputs, other.inputs + other.outputs, strict=True):
                ours, wanted = model.tensors[a], published.model.tensors[b]
                assert (ours.dtype, ours.shape) == (wanted.dtype, wanted.shape)
                assert ours.zero_point == wanted.zero_point
                np.testing.assert_allclose(ours.scale, wanted.scale, rtol=1e-6)
                if ours.dtype == "uint8" and ours.value is not None:
                    np.testing.assert_array_equal(ours.value, wanted.value)
    source = published.output_of("CONV_2D") if published.logits else None
    pixels = published.pixels[:20]
    np.testing.assert_array_equal(
        interpret(data, pixels), interpret(published.data, pixels, source)
    )


def test_uint8_export_agrees_with_graph(classifier: Published) -> None:
    assert classifier.logits is not None
    data = tflite.convert(classifier.logits, classifier.size, uint8=True)
    theirs = interpret(data, classifier.pixels)
    ours = run(classifier.logits, as_seen(classifier.pixels))
    assert np.mean(ours.argmax(1) == theirs.argmax(1)) >= 0.98
    assert correlation(ours, theirs) > 0.995
    # Fed as any module is, bytes / 255, the input differs by up to one level.
    assert correlation(run(classifier.logits, classifier.pixels / np.float32(255)), theirs) > 0.995


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    spec, base = load_spec(QUANTOPS), tmp_path_factory.mktemp("quantops")
    formats: tuple[Literal["hub1", "tf2"], ...] = ("hub1", "tf2")
    return {f: build_module(spec, base / f, format=f, untrained=True) for f in formats}


@pytest.mark.parametrize("format", ["hub1", "tf2"])
def test_module_to_uint8(
    format: str, modules: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """A built module, both formats: every range of the file is what the module's own implies."""
    values = untrained_values(network_of(load_spec(QUANTOPS)).variables)
    folder = modules[format]
    model = tflite.to_tflite(folder, tmp_path / "m.tflite", uint8=True, signature=CLASSES)
    assert model.size_bytes == (tmp_path / "m.tflite").stat().st_size
    assert model.integer
    [source], [result] = model.inputs, model.outputs
    assert model.tensors[source][:5] == ("images", "uint8", (1, 160, 160, 3), (1 / 128,), (128,))
    assert model.tensors[result][1:3] == ("uint8", (1, 1001))
    checked = 0
    for operator in model.operators:
        if "CONV" not in operator.name:
            continue
        weights, output = model.tensors[operator.inputs[1]], model.tensors[operator.outputs[0]]
        [scope] = {
            part.split("/weights_quant")[0].removeprefix("StatefulPartitionedCall/")
            for part in weights.name.split(";")
            if "/weights_quant" in part
        }
        for tensor, kind, levels in ((weights, "weights", 254), (output, "act", 255)):
            low, high = (float(values[f"{scope}/{kind}_quant/{end}"]) for end in ("min", "max"))
            scale = (high - low) / levels
            np.testing.assert_allclose(tensor.scale, [scale], rtol=1e-5)
            assert abs(tensor.zero_point[0] - (255 - levels - low / scale)) <= 0.51
            checked += 1
    assert checked == 2 * 28
    with pytest.raises(ConfigError, match="its own quantisation ranges"):
        tflite.to_tflite(folder, tmp_path / "n.tflite", uint8=True, calibration=str(photos / "*"))


def test_module_to_float_keeps_the_rounding(
    modules: dict[str, Path], labelled: list[Path], tmp_path: Path
) -> None:
    folder = modules["hub1"]
    model = tflite.to_tflite(folder, tmp_path / "m.tflite")
    assert not model.integer
    assert not any(
        "int" in t.dtype and t.value is not None and t.value.size > 9 for t in model.tensors
    )
    images = pictures(labelled[::40], 160) / np.float32(255)
    graph = freeze(folder, resolve_folder(folder))
    found = interpret((tmp_path / "m.tflite").read_bytes(), images)
    assert correlation(found, run(graph, images)) > 0.999
