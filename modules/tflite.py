"""TensorFlow Lite: a module's graph as a float model or as an 8-bit model, and a reader of models.

What goes in: a float model takes the module's own input, float32 [1, h, w, 3] in [0, 1]. A uint8
model takes the picture's bytes as they are, 0 to 255: the scaling to [-1, 1] that a module begins
with is not in it, but in the quantisation of its input. The batch is 1. A float model of a quantops
module rounds its activations like the module.

What is inside a uint8 model depends on the module. A *quantops* module brings its own ranges, and
the converter makes of it what TF-Slim's published models are: uint8 throughout, one scale a tensor.
For all other modules ranges are measured on pictures (post-training quantisation), and the kernels
are int8 with one weight scale a channel, TensorFlow Lite's present scheme (the converter has no
other), between a uint8 input and a uint8 output. That costs accuracy, for the network was not
trained for it: look at the vectors before use. (mobilenet_v2_050_224 on 200 photographs: cosine to
the float vector 0.97 in the median, 0.77 at worst; nearest neighbour in the same class for 128
instead of 135.)
"""

import glob
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hubbeam.modules.engines.tensorflow import FrozenGraph, freeze, import_tensorflow
from hubbeam.modules.errors import ConfigError, ImageError, RunError
from hubbeam.modules.files import write
from hubbeam.modules.images import decode
from hubbeam.modules.presets import load_preset
from hubbeam.modules.store import resolve_folder

# A uint8 input q of a quantops model stands for (q - 128) / 128: how TF-Slim's quantised networks
# were published ("mean 128, standard deviation 128"). It differs from the training input,
# q / 127.5 - 1, by nothing at 0 and one step at 255.
INPUT_ZERO_POINT = 128
INPUT_SCALE = 1 / 128
# More pictures hardly move the ranges, but each costs a pass through the network.
MAX_CALIBRATION = 500


class TfliteTensor(NamedTuple):
    """A tensor of a TensorFlow Lite model.

    Attributes:
      name: as the converter made it.
      dtype: ``float32``, ``uint8``, ``int8``, ``int32`` ...
      shape: empty for a scalar.
      scale: one of the tensor or one of each channel; empty if it is not quantised.
      zero_point: likewise; a stored value q means ``scale * (q - zero_point)``.
      value: the stored values of a constant, else None.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    value: npt.NDArray[Any] | None


class TfliteOperator(NamedTuple):
    """An operator of a model, and which tensors it reads and writes (-1 for one left out)."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class TfliteModel(NamedTuple):
    """What is in a TensorFlow Lite file.

    Attributes:
      tensors: all tensors.
      operators: in the order in which they run.
      inputs: indices of the model's inputs.
      outputs: indices of the model's outputs.
      size_bytes: of the whole file.
    """

    tensors: tuple[TfliteTensor, ...]
    operators: tuple[TfliteOperator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    size_bytes: int

    @property
    def integer(self) -> bool:
        """Whether every operator reads and writes nothing but integers."""
        return all("int" in tensor.dtype for tensor in self.tensors)


def to_tflite(
    module: str | Path,
    output: str | Path,
    *,
    signature: str | None = None,
    uint8: bool = False,
    calibration: str | Sequence[str] | npt.NDArray[np.uint8] | None = None,
) -> TfliteModel:
    """Writes a module's signature as a TensorFlow Lite file.

    Args:
      module: folder of the module, TF1 Hub format or TF2 SavedModel.
      output: the file to write; it appears whole or not at all.
      signature: None for the feature vector, else ``image_classification`` and so on.
      uint8: whether all arithmetic shall be integer, with uint8 input and output.
      calibration: pictures to measure ranges on, where the module has none of its own: glob
        patterns of local files (read with the preset `photo`, those that cannot be read left
        out, 500 or so spread evenly over them if there are more), or uint8 [n, h, w, 3].

    Returns:
      What was written, as read back from it.

    Raises:
      ConfigError: the folder has no such signature; calibration pictures are missing, or given
        where they are of no use.
      RunError: the module cannot be loaded or converted.
    """
    name = Path(module).name
    if calibration is not None and not uint8:
        raise ConfigError("calibration pictures are of use only for a uint8 model")
    resolved = resolve_folder(module, signature)
    frozen = freeze(Path(module), resolved)
    if uint8 and not has_ranges(frozen) and calibration is None:
        raise ConfigError(
            f"module {name} has no quantisation ranges of its own: a uint8 model of it needs "
            "calibration pictures to measure them on: --calibration 'photos/*.jpg'"
        )
    if uint8 and has_ranges(frozen) and calibration is not None:
        raise ConfigError(
            f"module {name} has its own quantisation ranges: leave the calibration pictures away"
        )
    pixels = None
    if calibration is not None:
        pixels = _calibration(calibration, resolved.image_size)
    try:
        data = convert(frozen, resolved.image_size, uint8=uint8, calibration=pixels)
    except RunError as e:
        raise RunError(f"module {name}: {e}") from e
    write(str(output), data)
    return read_tflite(data)


def has_ranges(frozen: FrozenGraph) -> bool:
    """Tells whether fake-quantisation ops give the ranges of a graph's activations."""
    return any(node.op.startswith("FakeQuantWithMinMax") for node in frozen.graph_def.node)


def convert(
    frozen: FrozenGraph,
    image_size: tuple[int, int],
    *,
    uint8: bool = False,
    calibration: npt.NDArray[np.uint8] | None = None,
) -> bytes:
    """Converts a frozen graph, see `to_tflite`.

    Args:
      frozen: the graph from an image batch in [0, 1] to a tensor.
      image_size: height and width.
      uint8: whether all arithmetic shall be integer.
      calibration: uint8 [n, h, w, 3], needed for a uint8 model of a graph without ranges.

    Raises:
      RunError: the converter fails, or left other than integer arithmetic in a uint8 model.
    """
    tf = import_tensorflow()
    # Integers would lose a bit and more in `2x - 1`: a uint8 model begins behind it.
    scaled = _behind_scaling(tf, frozen, image_size) if uint8 else None
    start = scaled or frozen.input
    if not uint8 and has_ranges(frozen):
        frozen = _round_weights(tf, frozen)
    with tf.Graph().as_default() as graph:
        images = tf.compat.v1.placeholder(tf.float32, [1, *image_size, 3], "images")
        [result] = tf.import_graph_def(frozen.graph_def, {start: images}, [frozen.output], name="")
    with tf.compat.v1.Session(graph=graph) as session:
        # Only this converter (TensorFlow 1's interface, still the same compiler below) takes the
        # quantisation of the input as given and keeps to uint8 kernels.
        converter = tf.compat.v1.lite.TFLiteConverter.from_session(session, [images], [result])
    if uint8 and has_ranges(frozen):
        converter.inference_type = tf.uint8
        converter.quantized_input_stats = {
            "images": (INPUT_ZERO_POINT, 1 / INPUT_SCALE) if scaled else (0, 255.0)
        }
    elif uint8 and calibration is not None:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = partial(_samples, calibration, bool(scaled))
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = tf.uint8
        converter.inference_output_type = tf.uint8
    try:
        data: bytes = converter.convert()
    except Exception as e:  # the compiler's errors have no common class
        raise RunError(f"TensorFlow Lite cannot convert it: {e}") from e
    model = read_tflite(data)
    if uint8 and not model.integer:
        floats = sorted(
            {
                operator.name
                for operator in model.operators
                for i in (*operator.inputs, *operator.outputs)
                if i >= 0 and "int" not in model.tensors[i].dtype
            }
        )
        raise RunError(f"the uint8 model is not all integer; left over: {', '.join(floats)}")
    return data


def read_tflite(model: bytes | str | Path) -> TfliteModel:
    """Reads a TensorFlow Lite model, given whole or as a file's name, without running it.

    Raises:
      ConfigError: it is no TensorFlow Lite model, or has more than one graph.
    """
    import_tensorflow()
    from tensorflow.lite.python import schema_py_generated as schema

    data = model if isinstance(model, bytes) else Path(model).read_bytes()
    if data[4:8] != b"TFL3":
        raise ConfigError("this is no TensorFlow Lite model")
    content = schema.ModelT.InitFromPackedBuf(data, 0)
    if len(content.subgraphs) != 1:
        raise ConfigError(f"the model has {len(content.subgraphs)} graphs, not 1")
    types = _names(schema.TensorType)
    codes = _names(schema.BuiltinOperator)
    [graph] = content.subgraphs

    def tensor(t: Any) -> TfliteTensor:
        dtype = types[t.type].lower()
        shape = () if t.shape is None else tuple(int(n) for n in t.shape)
        quantization = t.quantization or schema.QuantizationParametersT()
        scale = () if quantization.scale is None else quantization.scale
        zero = () if quantization.zeroPoint is None else quantization.zeroPoint
        buffer = content.buffers[t.buffer].data
        value = None
        if buffer is not None:
            value = np.frombuffer(np.asarray(buffer, np.uint8).tobytes(), dtype).reshape(shape)
        return TfliteTensor(
            t.name.decode(), dtype, shape, tuple(map(float, scale)), tuple(map(int, zero)), value
        )

    def operator(o: Any) -> TfliteOperator:
        code = content.operatorCodes[o.opcodeIndex]
        # Small codes are kept in the older, narrower field.
        name = codes[max(code.builtinCode, code.deprecatedBuiltinCode)]
        return TfliteOperator(name, tuple(map(int, o.inputs)), tuple(map(int, o.outputs)))

    return TfliteModel(
        tuple(map(tensor, graph.tensors)),
        tuple(map(operator, graph.operators)),
        tuple(map(int, graph.inputs)),
        tuple(map(int, graph.outputs)),
        len(data),
    )


def _names(enumeration: Any) -> dict[int, str]:
    return {value: name for name, value in vars(enumeration).items() if isinstance(value, int)}


def _round_weights(tf: Any, frozen: FrozenGraph) -> FrozenGraph:
    """Computes the fake quantisation of weights once: a float model would repeat it in each run."""
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(frozen.graph_def, name="")
    varying = {graph.get_tensor_by_name(frozen.input).op.name}
    constant = {}
    for op in graph.get_operations():  # inputs come before their consumers
        if any(t.op.name in varying for t in op.inputs):
            varying.add(op.name)
        elif op.type.startswith("FakeQuant"):
            constant[op.name] = op.outputs[0]
    with tf.compat.v1.Session(graph=graph) as session:
        values = session.run(constant)
    folded = tf.compat.v1.GraphDef()
    for node in frozen.graph_def.node:
        added = folded.node.add()
        if node.name not in values:
            added.CopyFrom(node)
            continue
        added.name, added.op = node.name, "Const"
        added.attr["dtype"].type = tf.float32.as_datatype_enum
        added.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(values[node.name]))
    return frozen._replace(graph_def=folded)


def _behind_scaling(tf: Any, frozen: FrozenGraph, image_size: tuple[int, int]) -> str | None:
    """Finds the tensor that holds 2x - 1, with which TF-Slim's networks begin in a Hub module.

    Returns:
      The tensor's name; None if the network takes images in [0, 1] as they are, or scales them in
      another way.
    """
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(frozen.graph_def, name="")
    tensor = graph.get_tensor_by_name(frozen.input)
    while len(tensor.consumers()) == 1:
        [step] = tensor.consumers()
        others = [t for t in step.inputs if t is not tensor]
        if step.type not in ("Identity", "Mul", "Sub", "Add", "AddV2", "RealDiv") or any(
            t.op.type != "Const" or t.shape.num_elements() != 1 for t in others
        ):
            break
        tensor = step.outputs[0]
    levels = np.linspace(0.0, 1.0, 5, dtype=np.float32).reshape(-1, 1, 1, 1)
    pixels = np.broadcast_to(levels, (5, *image_size, 3))
    with tf.compat.v1.Session(graph=graph) as session:
        found = session.run(tensor, {frozen.input: pixels})
    if found.shape == pixels.shape and np.allclose(found, 2 * pixels - 1, atol=1e-6):
        return str(tensor.name)
    return None


def _samples(
    pictures: npt.NDArray[np.uint8], both_sides: bool
) -> Iterator[list[npt.NDArray[np.float32]]]:
    for i, picture in enumerate(pictures):
        x = picture[np.newaxis].astype(np.float32) / 255
        if i == 0:
            # Black and white pin the input's range, so that a byte always means the same.
            x[0, 0, 0], x[0, -1, -1] = 0.0, 1.0
        yield [2 * x - 1 if both_sides else x]


def _calibration(
    given: str | Sequence[str] | npt.NDArray[np.uint8], image_size: tuple[int, int]
) -> npt.NDArray[np.uint8]:
    if isinstance(given, np.ndarray):
        if given.dtype != np.uint8 or given.shape[1:] != (*image_size, 3) or not len(given):
            raise ConfigError(
                f"calibration pictures are {given.dtype} {list(given.shape)}, "
                f"not uint8 [n, {image_size[0]}, {image_size[1]}, 3] with n above 0"
            )
        return given
    patterns = [given] if isinstance(given, str) else list(given)
    found = (glob.glob(p, recursive=True) for p in patterns)  # noqa: PTH207 - may be absolute
    files = sorted({file for files in found for file in files})
    files = files[:: -(-len(files) // MAX_CALIBRATION) or 1]
    preset = load_preset("photo")
    pixels = np.empty((len(files), *image_size, 3), preset.dtype)
    read = 0
    problem = "no file matches"
    for file in files:
        try:
            decode(Path(file).read_bytes(), preset, [pixels[read]])
            read += 1
        except (ImageError, OSError) as e:
            problem = f"{file}: {e}"
    if not read:
        raise ConfigError(f"no calibration picture in {' '.join(patterns)}: {problem}")
    return pixels[:read]
