"""The signature in OpenVINO: the frozen graph as OpenVINO's IR, computed in float32.

A model that is compiled for one stream of one thread computes in the thread that asks for it (so
OpenVINO's `AsyncInferRequest` of the CPU plugin); with more streams other threads do, and whoever
decodes pictures meanwhile shares its core with them. So each thread has a compiled model of its
own. Shapes are static and a request is small: what a layer leaves behind is still in the cache
when the next one reads it.
"""

import io
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path
from threading import Lock, Semaphore
from typing import Any, Literal, NamedTuple

import numpy as np

from hubbeam.modules.engines.base import check_pixels
from hubbeam.modules.engines.tensorflow import add_constant, freeze, import_tensorflow
from hubbeam.modules.errors import ConfigError, RunError
from hubbeam.modules.spec import ResolvedModule

NAME = "openvino"

CONVERSION = 2
"""Number of the way in which `convert` converts: another way, another number."""


def import_openvino() -> Any:
    """Imports OpenVINO.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        import openvino
    except ImportError as e:
        raise ConfigError(
            f"engine openvino: OpenVINO cannot be imported ({e}); pip install 'hubbeam[openvino]'"
        ) from e
    return openvino


class Converted(NamedTuple):
    """A module's signature as OpenVINO's IR, and what it must compute.

    Attributes:
      xml: the graph.
      weights: its constants.
      reference: float32 [pictures, width], TensorFlow's vectors of `check_pictures`.
    """

    xml: bytes
    weights: bytes
    reference: np.ndarray

    def pack(self) -> bytes:
        """Returns it as a zip archive, which also notices damage."""
        archive = io.BytesIO()
        vectors = io.BytesIO()
        np.save(vectors, self.reference, allow_pickle=False)
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("model.xml", self.xml)
            file.writestr("model.bin", self.weights)
            file.writestr("reference.npy", vectors.getvalue())
        return archive.getvalue()

    @classmethod
    def unpack(cls, data: bytes) -> "Converted":
        """Reads what `pack` returned.

        Raises:
          ValueError: it is damaged.
        """
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as file:
                return cls(
                    file.read("model.xml"),
                    file.read("model.bin"),
                    np.load(io.BytesIO(file.read("reference.npy")), allow_pickle=False),
                )
        except (zipfile.BadZipFile, KeyError, EOFError) as e:
            raise ValueError(str(e)) from e


def convert(folder: Path, module: ResolvedModule, reference: np.ndarray) -> Converted:
    """Converts a module's signature to OpenVINO's IR. Needs TensorFlow.

    Args:
      folder: the module.
      module: what to convert of it.
      reference: TensorFlow's vectors of `check_pictures`.

    Raises:
      ConfigError: OpenVINO is not installed, or the module has no such signature.
      RunError: OpenVINO cannot convert the module.
    """
    ov = import_openvino()
    frozen = freeze(folder, module)
    _use_slices(frozen.graph_def)
    with tempfile.TemporaryDirectory() as scratch:
        graph, xml = Path(scratch, "frozen.pb"), Path(scratch, "model.xml")
        graph.write_bytes(frozen.graph_def.SerializeToString())
        try:
            # `Core.read_model` does what `openvino.convert_model` does, but sends no usage data.
            model = ov.Core().read_model(graph)
            if len(model.inputs) != 1 or len(model.outputs) != 1:
                raise RuntimeError(f"{len(model.inputs)} inputs, {len(model.outputs)} outputs")
            model.reshape([-1, *module.image_size, 3])
            ov.save_model(model, xml, compress_to_fp16=False)
        except RuntimeError as e:
            raise RunError(f"module {module.name}: OpenVINO cannot convert it: {e}") from e
        return Converted(xml.read_bytes(), xml.with_suffix(".bin").read_bytes(), reference)


def _use_slices(graph_def: Any) -> None:
    """Writes each ``x[a:, b:, ...]`` of a frozen graph as a `Slice`, in place.

    OpenVINO orders the axes of pictures otherwise than TensorFlow. The transpositions which that
    takes are moved past a `Slice` until they cancel out, but not past a `StridedSlice`, of which
    NASNet has four: they took a tenth of its time.
    """
    tf = import_tensorflow()
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
    constants = {node.name: node.attr["value"] for node in graph_def.node if node.op == "Const"}
    for node in list(graph_def.node):
        if node.op != "StridedSlice" or not constants.keys() >= set(node.input[1:]):
            continue
        begin, _, strides = (tf.make_ndarray(constants[name].tensor) for name in node.input[1:])
        sliced = graph.get_operation_by_name(node.name).inputs[0]
        masks = {name: node.attr[name].i for name in node.attr if name.endswith("_mask")}
        whole, to_end = masks.pop("begin_mask", 0), masks.pop("end_mask", 0)
        begin = np.where([whole >> axis & 1 for axis in range(len(begin))], 0, begin)
        every_axis = sliced.shape.rank == len(begin) and to_end == 2 ** len(begin) - 1
        if not every_axis or any(masks.values()) or (begin < 0).any() or (strides != 1).any():
            continue
        node.op = "Slice"
        for mask in ("begin_mask", "end_mask", *masks):
            node.attr.pop(mask, None)
        node.input[1:] = [
            add_constant(graph_def, f"{node.name}/begin", begin),
            add_constant(graph_def, f"{node.name}/size", np.full_like(begin, -1)),
        ]


def take_bytes(model: Any) -> Any:
    """Makes a model of float32 pictures in [0, 1] one of uint8 pictures in 0 to 255.

    By hand, because OpenVINO's own way (`PrePostProcessor`) transposes the bytes first and the
    float32 values back afterwards: 6 % of the time of MobileNet V2.

    Args:
      model: its only input is the pictures, which it loses.
    """
    ov = import_openvino()
    pictures = model.input()
    given = ov.opset13.parameter(pictures.partial_shape, ov.Type.u8)
    scaled = ov.opset13.divide(ov.opset13.convert(given, ov.Type.f32), np.float32(255))
    for reader in pictures.get_target_inputs():
        reader.replace_source_output(scaled.output(0))
    return ov.Model(model.get_results(), [given])


class OpenVINOEngine:
    """See `hubbeam.modules.engines.base.Engine`. A call computes in the thread that makes it.

    Args:
      converted: the module, see `convert`.
      module: what it is.
      batch_size: images that a request takes; the last part of a batch is filled up with zeros.
      streams: calls that compute at once; others wait. Each holds the weights for itself: 20 MB for
        MobileNet V2, 55 MB for Inception V2, 75 MB for NASNet mobile.
      precision: type that it computes in.

    Raises:
      ConfigError: OpenVINO is not installed.
      RunError: the converted module cannot be read.
    """

    def __init__(
        self,
        converted: Converted,
        module: ResolvedModule,
        *,
        batch_size: int = 1,
        streams: int = 1,
        precision: Literal["f32", "bf16"] = "f32",
    ):
        ov = import_openvino()
        self.name = NAME if precision == "f32" else f"{NAME}-{precision}"
        self.version: str = ov.__version__.split("-")[0]
        self.batch_size = batch_size
        self.streams = streams
        self._module = module
        self._ov = ov
        self._core = ov.Core()
        try:
            self._model = self._core.read_model(converted.xml, converted.weights)
            self._model.reshape([batch_size, *module.image_size, 3])
        except RuntimeError as e:
            raise RunError(f"module {module.name}: OpenVINO cannot read it: {e}") from e
        self._options = {
            "INFERENCE_PRECISION_HINT": precision,
            "EXECUTION_MODE_HINT": "ACCURACY" if precision == "f32" else "PERFORMANCE",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": "1",
            "ENABLE_HYPER_THREADING": True,
            # Pinned threads of two worker processes would share one core.
            "ENABLE_CPU_PINNING": False,
        }
        self._turns = Semaphore(streams)
        # Requests that nobody uses. The one used last is taken first: its weights are in the cache.
        self._free: dict[np.dtype, list[Any]] = defaultdict(list)
        self._cloning = Lock()  # OpenVINO does not say that two threads may clone one model

    def _compile(self, dtype: np.dtype) -> Any:
        """Compiles the model for pixels of a type; returns a request of it."""
        with self._cloning:
            model = self._model.clone()
        if dtype == np.uint8:
            model = take_bytes(model)
        return self._core.compile_model(model, "CPU", self._options).create_infer_request()

    def run(self, pixels: np.ndarray) -> np.ndarray:
        """See `Engine.run`."""
        pixels = check_pixels(pixels, self._module.image_size)
        vectors = np.empty((len(pixels), self._module.width), np.float32)
        if not len(pixels):
            return vectors
        with self._turns:
            free = self._free[pixels.dtype]
            try:
                request = free.pop()
            except IndexError:
                request = self._compile(pixels.dtype)
            for start in range(0, len(pixels), self.batch_size):
                part = pixels[start : start + self.batch_size]
                wanted = vectors[start : start + self.batch_size]
                # OpenVINO reads the pixels where they are, but takes no memory that is read-only.
                if len(part) < self.batch_size or not part.flags.writeable:
                    filled = np.zeros((self.batch_size, *part.shape[1:]), part.dtype)
                    filled[: len(part)] = part
                    part = filled
                request.set_input_tensor(self._ov.Tensor(part, shared_memory=True))
                request.infer()
                wanted[...] = request.get_output_tensor().data.reshape(self.batch_size, -1)[
                    : len(wanted)
                ]
            free.append(request)  # not after a failure
        return vectors
