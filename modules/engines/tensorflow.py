"""The reference engine: the signature frozen to one TensorFlow graph.

Only what lies between the signature's image input and the wanted output is kept, variables become
constants and batch norm is folded into the convolution before it. The graph is called through a
session of its own: `Session.run` leaves Python's lock (a session callable does not), and with one
thread a call runs wholly in the thread that makes it, so that callers share nothing.
"""

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hubbeam.modules.engines.base import check_pixels
from hubbeam.modules.errors import ConfigError, RunError
from hubbeam.modules.spec import ResolvedModule
from hubbeam.modules.stderr import stderr_into

NAME = "tensorflow"


def import_tensorflow() -> Any:
    """Imports TensorFlow, without its start-up messages unless TF_CPP_MIN_LOG_LEVEL is 0."""
    if "tensorflow" in sys.modules or os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "0":
        import tensorflow

        return tensorflow
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _without_notices():
        import tensorflow
    tensorflow.get_logger().setLevel("ERROR")
    return tensorflow


@contextmanager
def _without_notices() -> Iterator[None]:
    # TensorFlow 2.21 writes notices (I0000 ...) to stderr whatever the log level is. What other
    # threads write meanwhile comes later, but comes.
    with tempfile.TemporaryFile() as spool:
        try:
            with stderr_into(spool):
                yield
        finally:
            spool.seek(0)
            for line in spool:
                if not line.startswith((b"I0000 ", b"WARNING: All log messages before absl")):
                    os.write(2, line)


class FrozenGraph(NamedTuple):
    """A graph without variables: a ``GraphDef``, and the names of its input and output tensors."""

    graph_def: Any
    input: str
    output: str


def freeze(folder: Path, module: ResolvedModule) -> FrozenGraph:
    """Freezes one output of a module's signature.

    Args:
      folder: the module, TF1 Hub format or TF2 SavedModel.
      module: names the tags, the signature, its input and its output.

    Raises:
      ConfigError: the module has no such tags, signature, input or output, or needs more inputs.
      RunError: the module cannot be read.
    """
    tf = import_tensorflow()
    from tensorflow.python.framework import convert_to_constants

    try:
        if module.format == "hub1":
            # The loader of TensorFlow 1 makes nothing but the graph: no eager context, less memory.
            with tf.Graph().as_default() as graph, _session(tf, graph) as session:
                meta = tf.compat.v1.saved_model.load(session, list(module.tags), str(folder))
                signature = _item(meta.signature_def, module.signature, "signature", module)
                source = _item(signature.inputs, module.input, "input", module).name
                target = _item(signature.outputs, module.output, "output", module).name
                graph_def = convert_to_constants.convert_variables_to_constants_from_session_graph(
                    session, graph.as_graph_def(), [_node(target)]
                )
        else:
            loaded = tf.saved_model.load(str(folder), tags=list(module.tags))
            function = _item(loaded.signatures, module.signature, "signature", module)
            _, inputs = function.structured_input_signature
            _item(inputs, module.input, "input", module)
            _item(function.structured_outputs, module.output, "output", module)
            frozen = convert_to_constants.convert_variables_to_constants_v2(function)
            # Both lists are flattened in the order of the sorted names.
            source = frozen.inputs[sorted(inputs).index(module.input)].name
            target = frozen.outputs[sorted(function.structured_outputs).index(module.output)].name
            graph_def = frozen.graph.as_graph_def()
    except (OSError, RuntimeError, ValueError, tf.errors.OpError) as e:
        raise RunError(f"module {module.name}: TensorFlow cannot load {folder}: {e}") from e

    # A frozen graph has no state, so the order that control inputs ask for means nothing, but they
    # would keep Identity nodes alive that hide constants from the folding.
    for node in graph_def.node:
        data = [name for name in node.input if not name.startswith("^")]
        del node.input[:]
        node.input.extend(data)
        # `remove_training_nodes` drops checks for NaN together with what they pass on. One bad
        # picture shall not fail its batch: its vector is NaN then, and that is seen later.
        if node.op == "CheckNumerics":
            node.op = "Identity"
            del node.attr["message"]
    utils = tf.compat.v1.graph_util
    graph_def = utils.extract_sub_graph(graph_def, [_node(target)])
    graph_def = utils.remove_training_nodes(graph_def, [_node(target)])
    missing = sorted(
        node.name
        for node in graph_def.node
        if node.op == "Placeholder" and node.name != _node(source)
    )
    if missing or _node(source) not in {node.name for node in graph_def.node}:
        raise ConfigError(
            f"module {module.name}: output {module.output!r} of signature {module.signature!r} "
            + (
                f"needs more inputs than an image: {', '.join(missing)}"
                if missing
                else f"does not depend on its input {module.input!r}"
            )
        )
    _fold_batch_norms(tf, graph_def)
    # The constants that the folding left without use.
    graph_def = utils.extract_sub_graph(graph_def, [_node(target)])
    return FrozenGraph(graph_def, source, target)


def _fold_batch_norms(tf: Any, graph_def: Any) -> None:
    """Turns convolution and batch norm into convolution and bias, in place.

    TensorFlow does so itself for `Conv2D` only, not for depthwise convolutions; its tool for frozen
    graphs (`optimize_for_inference`) takes most of a minute for a network of 10 million weights.
    """
    nodes = {node.name: node for node in graph_def.node}
    readers = Counter(_node(name) for node in graph_def.node for name in node.input)
    for node in list(graph_def.node):
        if node.op not in ("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"):
            continue
        conv, *parameters = (nodes[_node(name)] for name in node.input)
        if (
            conv.op not in ("Conv2D", "DepthwiseConv2dNative")
            or readers[conv.name] > 1
            or node.attr["is_training"].b
        ):
            continue
        constants = [nodes[_node(conv.input[1])], *parameters]
        if any(constant.op != "Const" for constant in constants):
            continue
        weights, gamma, beta, mean, variance = (
            tf.make_ndarray(constant.attr["value"].tensor).astype(np.float64)
            for constant in constants
        )
        scale = gamma / np.sqrt(variance + node.attr["epsilon"].f)
        if conv.op == "Conv2D":  # [height, width, in, out]
            weights = weights * scale
        else:  # [height, width, in, multiplier], channel in * multipliers + multiplier
            weights = weights * scale.reshape(weights.shape[2:])
        new_weights = add_constant(
            graph_def, f"{conv.name}/folded_weights", weights.astype(np.float32)
        )
        bias = (beta - mean * scale).astype(np.float32)
        new_bias = add_constant(graph_def, f"{node.name}/folded_bias", bias)
        conv.input[1] = new_weights
        layout = node.attr["data_format"].s or b"NHWC"
        node.op = "BiasAdd"
        node.ClearField("attr")
        node.attr["T"].type = tf.float32.as_datatype_enum
        node.attr["data_format"].s = layout
        node.input[:] = [conv.name, new_bias]


def add_constant(graph_def: Any, name: str, values: np.ndarray) -> str:
    """Adds a node of constant values to a graph, of their own type; returns its name."""
    tf = import_tensorflow()
    node = graph_def.node.add(name=name, op="Const")
    node.attr["dtype"].type = tf.as_dtype(values.dtype).as_datatype_enum
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(values))
    return name


def _node(tensor: str) -> str:
    return tensor.split(":")[0]


def _item(items: Any, key: str, kind: str, module: ResolvedModule) -> Any:
    if key not in items:
        raise ConfigError(
            f"module {module.name} has no {kind} {key!r}; it has {', '.join(sorted(items))}"
        )
    return items[key]


def _session(tf: Any, graph: Any) -> Any:
    """Makes a session whose calls run in the thread that makes them.

    The pool inside ops is the process's: the first session or eager context sets its size.
    """
    config = tf.compat.v1.ConfigProto(
        intra_op_parallelism_threads=1,
        inter_op_parallelism_threads=-1,  # ops of one call one after the other, in its thread
        device_count={"GPU": 0},
    )
    return tf.compat.v1.Session(graph=graph, config=config)


class TensorFlowEngine:
    """See `hubbeam.modules.engines.base.Engine`. A call computes in the thread that makes it.

    Args:
      folder: the module.
      module: what to run of it.
      batch_size: images that go through the graph at once; a larger batch is split.
      streams: threads that will call `run` at once.

    Raises:
      ConfigError: the module has no such tags, signature, input or output.
      RunError: it cannot be read.
    """

    name = NAME

    def __init__(
        self,
        folder: Path,
        module: ResolvedModule,
        *,
        batch_size: int = 4,
        streams: int = 1,
    ):
        tf = import_tensorflow()
        # Loading a TF2 module starts the eager context, whose pools are the whole process's. A
        # process that uses TensorFlow already keeps those that it has.
        with suppress(RuntimeError):
            tf.config.threading.set_intra_op_parallelism_threads(1)
            tf.config.threading.set_inter_op_parallelism_threads(1)
        self.version: str = tf.__version__
        self.batch_size = batch_size
        self.streams = streams
        self._module = module
        frozen = freeze(folder, module)
        with tf.Graph().as_default() as graph:
            self._bytes = tf.compat.v1.placeholder(tf.uint8, [None, *module.image_size, 3])
            self._floats = tf.cast(self._bytes, tf.float32) / 255.0
            [output] = tf.import_graph_def(
                frozen.graph_def, {frozen.input: self._floats}, [frozen.output], name=""
            )
            self._output = tf.reshape(output, [-1, module.width])
        self._session = _session(tf, graph)

    def run(self, pixels: np.ndarray) -> np.ndarray:
        """See `Engine.run`."""
        pixels = check_pixels(pixels, self._module.image_size)
        # Float pixels are fed in place of the division's result.
        place = self._bytes if pixels.dtype == np.uint8 else self._floats
        vectors = np.empty((len(pixels), self._module.width), np.float32)
        for start in range(0, len(pixels), self.batch_size):
            part = slice(start, start + self.batch_size)
            vectors[part] = self._session.run(self._output, {place: pixels[part]})
        return vectors
