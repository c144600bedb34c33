"""What is inside a module's folder, read from its SavedModel protobuf alone."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from hubbeam.modules.errors import ConfigError
from hubbeam.modules.spec import CLASSES, FEATURES, ModuleInfo, SignatureInfo, TensorInfo

# Where tensorflow_hub's module exporter kept messages attached to a module
# (tensorflow_hub/saved_model_lib.py and module_attachment.proto in tensorflow/hub).
ATTACHMENTS = "hub_module_attachments"
IMAGE_MODULE_INFO = "image_module_info"
NOTES_FILE = "hubbeam.json"
_PREFERRED = (FEATURES, "default", "serving_default")


class Choice(NamedTuple):
    """What is called in a module: signature, its input and output keys, (h, w), vector width."""

    signature: str
    input: str
    output: str
    image_size: tuple[int, int]
    width: int


def is_module(folder: Path) -> bool:
    """Tells whether a SavedModel stands directly in `folder`."""
    return any((folder / f).is_file() for f in ("saved_model.pb", "saved_model.pbtxt"))


def inspect_module(folder: str | Path) -> ModuleInfo:
    """Reads what a module offers, without loading its variables or graph.

    Args:
      folder: a TF1 Hub module (it has a ``tfhub_module.pb``) or a TF2 SavedModel.

    Returns:
      Format, tag sets, signatures and so on. The image size is that of the attached
      ``image_module_info`` message if there is one, else that of the signature's input shape, as
      ``hub.get_expected_image_size`` has it.

    Raises:
      ConfigError: there is no SavedModel in the folder, or it cannot be read.
    """
    folder = Path(folder)
    saved_model = _read_saved_model(folder)
    hub1 = (folder / "tfhub_module.pb").is_file()
    tag_sets = [tuple(sorted(g.meta_info_def.tags)) for g in saved_model.meta_graphs]
    graph = saved_model.meta_graphs[_inference_graph(tag_sets, hub1, folder)]
    signatures = {
        name: SignatureInfo(
            inputs={k: _tensor(t) for k, t in sorted(signature.inputs.items())},
            outputs={k: _tensor(t) for k, t in sorted(signature.outputs.items())},
        )
        for name, signature in sorted(graph.signature_def.items())
        if not name.startswith("__saved_model")
    }
    notes = _notes(folder)
    variables = _variables(graph)
    trainable = sum(math.prod(shape) for shape, trained in variables if trained)
    can_train = any("train" in tags for tags in tag_sets) if hub1 else trainable > 0
    return ModuleInfo(
        format="hub1" if hub1 else "tf2",
        tag_sets=tuple(sorted(tag_sets)),
        signatures=signatures,
        image_size=_attached_size(graph) or _signature_size(signatures),
        parameters=trainable if variables else None,
        variables=len(variables) if variables else None,
        size_bytes=sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
        fine_tunable=bool(notes.get("fine_tunable", can_train)),
        notes=notes,
    )


def choose(info: ModuleInfo, signature: str | None, where: str) -> Choice:
    """Picks the signature to call and checks that it maps images to vectors.

    Args:
      info: what is in the module.
      signature: the signature wanted; None takes ``image_feature_vector``, else ``default``, else
        ``serving_default``.
      where: the module's name, for error messages.

    Raises:
      ConfigError: there is no such signature, or it does not take float32 [n, h, w, 3] of a known
        size to float32 [n, width].
    """
    names = [signature] if signature else [s for s in _PREFERRED if s in info.signatures]
    if not names or names[0] not in info.signatures:
        has = ", ".join(info.signatures) or "none"
        wanted = repr(signature) if signature else " or ".join(_PREFERRED)
        raise ConfigError(f"module {where} has no signature {wanted}; it has: {has}")
    name = names[0]
    found = info.signatures[name]
    at = f"module {where}, signature {name!r}"
    key = _only(found.inputs, "images", f"{at}: input")
    out = _only(found.outputs, "default", f"{at}: output")
    images, vectors = found.inputs[key], found.outputs[out]
    shape = images.shape or (None,) * 4
    if images.dtype != "float32" or len(shape) != 4 or shape[3] not in (3, None):
        raise ConfigError(f"{at}: input {key!r} is {images}, not images float32 [n, h, w, 3]")
    if shape[0] is not None:
        raise ConfigError(f"{at}: input {key!r} is {images}: only batches of {shape[0]} fit")
    if vectors.dtype != "float32" or vectors.shape is None or len(vectors.shape) != 2:
        raise ConfigError(f"{at}: output {out!r} is {vectors}, not vectors float32 [n, width]")
    width = vectors.shape[1]
    if width is None:
        raise ConfigError(f"{at}: output {out!r} is {vectors}: it does not say its width")
    fixed = _size(images)
    size = info.image_size or fixed
    if size is None:
        raise ConfigError(
            f"{at}: the image size is unknown: there is no image_module_info in the module, and "
            f"input {key!r} is {images}"
        )
    if any(is_ is not None and is_ != wants for is_, wants in zip(shape[1:3], size, strict=True)):
        raise ConfigError(f"{at}: input {key!r} is {images}, but image_module_info says {size}")
    return Choice(name, key, out, size, width)


def end_points(info: ModuleInfo) -> dict[str, TensorInfo]:
    """Returns the inner end points that ``image_feature_vector`` gives beside the vector."""
    found = info.signatures.get(FEATURES) or info.signatures.get(CLASSES)
    return {k: t for k, t in found.outputs.items() if k != "default"} if found else {}


def _read_saved_model(folder: Path) -> Any:
    # Here, not above: the engines import the store, which imports this file.
    from hubbeam.modules.engines.tensorflow import import_tensorflow

    import_tensorflow()
    from google.protobuf import text_format
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf import saved_model_pb2

    if not is_module(folder):
        raise ConfigError(f"{folder} holds no module: there is no saved_model.pb in it")
    saved_model = saved_model_pb2.SavedModel()
    binary = folder / "saved_model.pb"
    try:
        if binary.is_file():
            saved_model.ParseFromString(binary.read_bytes())
        else:
            text_format.Parse((folder / "saved_model.pbtxt").read_text(), saved_model)
    except (DecodeError, text_format.ParseError, OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"the SavedModel in {folder} cannot be read: {e}") from e
    if not saved_model.meta_graphs:
        raise ConfigError(f"the SavedModel in {folder} holds no graph")
    return saved_model


def _inference_graph(tag_sets: list[tuple[str, ...]], hub1: bool, folder: Path) -> int:
    wanted: tuple[str, ...] = () if hub1 else ("serve",)
    if wanted not in tag_sets:
        has = ", ".join(map(str, map(list, tag_sets)))
        raise ConfigError(
            f"the module in {folder} has no graph tagged {list(wanted)}; it has {has}"
        )
    return tag_sets.index(wanted)


def _tensor(info: Any) -> TensorInfo:
    import tensorflow as tf

    shape = None
    if not info.tensor_shape.unknown_rank:
        shape = tuple(None if d.size < 0 else d.size for d in info.tensor_shape.dim)
    return TensorInfo(dtype=tf.dtypes.as_dtype(info.dtype).name, shape=shape)


def _only(tensors: dict[str, TensorInfo], preferred: str, what: str) -> str:
    if preferred in tensors:
        return preferred
    if len(tensors) != 1:
        raise ConfigError(f"{what} is not clear: {preferred!r} is not among {sorted(tensors)}")
    return next(iter(tensors))


def _size(images: TensorInfo) -> tuple[int, int] | None:
    if images.shape is None or len(images.shape) != 4:
        return None
    _, height, width, _ = images.shape
    return None if height is None or width is None else (height, width)


def _signature_size(signatures: dict[str, SignatureInfo]) -> tuple[int, int] | None:
    for name in (*_PREFERRED, CLASSES):
        if name in signatures:
            for images in signatures[name].inputs.values():
                if size := _size(images):
                    return size
    return None


def _attached_size(graph: Any) -> tuple[int, int] | None:
    attachment, image_module_info = attachment_messages()
    for data in graph.collection_def[ATTACHMENTS].bytes_list.value:
        message = attachment.FromString(data)
        if message.key == IMAGE_MODULE_INFO:
            size = image_module_info.FromString(message.value).default_image_size
            return (size.height, size.width)
    return None


def attachment_messages() -> tuple[Any, Any]:
    """Returns the message classes ModuleAttachment and ImageModuleInfo.

    tensorflow_hub no longer ships them; the field numbers are those of its
    ``module_attachment.proto`` and ``image_module_info.proto``.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="hubbeam/attachments.proto", package="hubbeam", syntax="proto3"
    )

    def message(name: str, *fields: tuple[str, int, str]) -> None:
        added = file.message_type.add(name=name)
        for number, (key, kind, type_name) in enumerate(fields, 1):
            added.field.add(
                name=key,
                number=number,
                type=kind,
                label=field.LABEL_OPTIONAL,
                type_name=type_name or None,
            )

    message("ModuleAttachment", ("key", field.TYPE_STRING, ""), ("value", field.TYPE_BYTES, ""))
    message("InputSize", ("height", field.TYPE_INT32, ""), ("width", field.TYPE_INT32, ""))
    message("ImageModuleInfo", ("default_image_size", field.TYPE_MESSAGE, ".hubbeam.InputSize"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return (
        message_factory.GetMessageClass(pool.FindMessageTypeByName("hubbeam.ModuleAttachment")),
        message_factory.GetMessageClass(pool.FindMessageTypeByName("hubbeam.ImageModuleInfo")),
    )


def _variables(graph: Any) -> list[tuple[tuple[int, ...], bool]]:
    objects = [n.variable for n in graph.object_graph_def.nodes if n.HasField("variable")]
    if objects:
        return [(tuple(d.size for d in v.shape.dim), v.trainable) for v in objects]
    shapes = {
        node.name: tuple(d.size for d in node.attr["shape"].shape.dim)
        for node in graph.graph_def.node
        if node.op in ("VarHandleOp", "VariableV2", "Variable")
    }
    trainable = set(_collected(graph, "trainable_variables"))
    return [
        (shapes[name], name in trainable)
        for name in dict.fromkeys(_collected(graph, "variables"))
        if name in shapes
    ]


def _collected(graph: Any, collection: str) -> Iterable[str]:
    from tensorflow.core.framework import variable_pb2

    for data in graph.collection_def[collection].bytes_list.value:
        yield variable_pb2.VariableDef.FromString(data).variable_name.removesuffix(":0")


def _notes(folder: Path) -> dict[str, Any]:
    file = folder / NOTES_FILE
    if not file.is_file():
        return {}
    try:
        notes = json.loads(file.read_bytes())
    except ValueError as e:
        raise ConfigError(f"{file} is not JSON: {e}") from e
    if not isinstance(notes, dict):
        raise ConfigError(f"{file} must hold a JSON object")
    return notes
