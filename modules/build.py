"""Builds a module: a network and the values of its variables become a folder that TF-Hub loads.

Two formats. ``hub1`` is what TF-Slim's modules were published in: a SavedModel with one graph for
each tag set (``[]`` for inference, ``["train"]`` for fine-tuning) over the same variables, and a
``tfhub_module.pb``. ``tf2`` is the *reusable SavedModel* of TensorFlow 2
(https://www.tensorflow.org/hub/reusable_saved_models).
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from hubbeam.modules.checkpoints import Checkpoint, open_checkpoint
from hubbeam.modules.download import Progress, download
from hubbeam.modules.errors import ConfigError, RunError
from hubbeam.modules.inspect import ATTACHMENTS, IMAGE_MODULE_INFO, NOTES_FILE, attachment_messages
from hubbeam.modules.networks.layers import Tensor, Variable, VariableSpec
from hubbeam.modules.networks.registry import CLASSIFIERS, Built, Network, graph_variable
from hubbeam.modules.spec import CLASSES, FEATURES, ModuleSpec

Format = Literal["hub1", "tf2"]
Values = Mapping[str, np.ndarray]

IMAGENET_CLASSES = 1001  # of TF-Slim's checkpoints: ImageNet's 1000 and, first, "background"
_HUB1_MARK = b"\x08\x03"  # a ModuleDef with format = FORMAT_V3 (tensorflow_hub/module_def.proto)

_INFERENCE_ONLY = "a quantops module has the inference graph only: it takes no training=True"


def build_module(
    spec: ModuleSpec,
    output: str | Path,
    *,
    checkpoint: str | Path | None = None,
    format: Format = "hub1",
    untrained: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Builds a module from a TF-Slim checkpoint, or with random values.

    A classifier is built where the checkpoint has one (untrained: where `spec` has classes); it
    gives the module its ``image_classification`` signature.

    Args:
      spec: the module's description.
      output: folder to make; it appears whole or not at all.
      checkpoint: see `checkpoints.open_checkpoint`; None fetches the one that `spec` names.
      format: see above.
      untrained: random values instead of a checkpoint, see `untrained_values`.
      progress: told of the download.

    Returns:
      The folder. Its ``hubbeam.json`` says how it was made: ``untrained``, ``network``, ``args``,
      ``checkpoint``, ``checkpoint_sha256``, ``fine_tunable``.

    Raises:
      ConfigError: `spec` names no network or one of another width, the checkpoint does not fit, or
        `output` is there already.
      RunError: the checkpoint could not be fetched.
    """
    output = Path(output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is there already; remove it, or give another folder")
    network = network_of(spec)
    notes: dict[str, Any] = {"module": spec.name, "network": network.builder, "args": network.args}
    if untrained:
        if checkpoint is not None:
            raise ConfigError("either a checkpoint or untrained values, not both")
        values = untrained_values(network.variables)
    else:
        with _checkpoint(spec, checkpoint, progress) as opened:
            network = _with_classifiers(network, opened, format)
            values = opened.read({name: v.shape for name, v in network.variables.items()})
            notes |= {
                "checkpoint": Path(opened.where).name,
                "checkpoint_sha256": opened.sha256,
            }
    if network.width != spec.width:
        raise ConfigError(
            f"network {network.builder} of module {spec.name} is {network.width} values wide, but "
            f"its description says {spec.width}"
        )
    notes |= {
        "untrained": untrained,
        "fine_tunable": not network.quantops,
        "format": format,
        "hubbeam": version("hubbeam"),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        temporary.mkdir()
        write = {"hub1": _write_hub1, "tf2": _write_tf2}[format]
        write(network, values, temporary, "logits" if spec.classes else "features")
        text = json.dumps(notes, indent=1, sort_keys=True) + "\n"
        (temporary / NOTES_FILE).write_text(text, encoding="utf-8")
        if output.exists():
            output.rmdir()
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def network_of(spec: ModuleSpec) -> Network:
    """Returns the network that a description names, with a classifier if it has classes.

    Raises:
      ConfigError: it names none.
    """
    if spec.network is None:
        raise ConfigError(f"module {spec.name} cannot be built: its description has no `network`")
    return Network(
        spec.network.builder,
        spec.network.args,
        image_size=spec.image_size,
        num_classes=spec.classes,
        quantops=spec.quantops,
    )


def untrained_values(specs: Mapping[str, VariableSpec]) -> dict[str, np.ndarray]:
    """Makes random values that keep activations in range; the same on every machine.

    Weights are uniform with the variance ``gain / fan_in`` (He et al. 2015), each variable from a
    generator of its own that is seeded by the variable's name; all others have the value that
    training begins with (batch norm is the identity). NumPy keeps the stream of this generator
    forever (NEP 19), and uniform numbers need no library function that may differ.

    Args:
      specs: variables by name.

    Returns:
      float32 arrays by name.
    """
    values = {}
    for name, spec in specs.items():
        if spec.fan_in is None:
            values[name] = np.full(spec.shape, spec.fill, np.float32)
            continue
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        reach = math.sqrt(3.0) * math.sqrt(spec.gain / spec.fan_in)
        uniform = np.random.RandomState(seed).random_sample(spec.shape)
        values[name] = ((2.0 * uniform - 1.0) * reach).astype(np.float32)
    return values


@contextmanager
def _checkpoint(
    spec: ModuleSpec, given: str | Path | None, progress: Progress | None
) -> Iterator[Checkpoint]:
    prefix = spec.checkpoint.prefix if spec.checkpoint else None
    if given is not None:
        with open_checkpoint(given, prefix) as opened:
            yield opened
        return
    if spec.checkpoint is None:
        raise ConfigError(f"module {spec.name} names no checkpoint; give one")
    urls = (spec.checkpoint.url, *spec.checkpoint.mirrors)
    with tempfile.TemporaryDirectory(prefix="hubbeam-checkpoint-") as folder:
        faults = []
        for url in urls:
            archive = Path(folder) / url.rsplit("/", 1)[-1]
            try:
                download(url, archive, progress=progress)
                break
            except RunError as e:
                faults.append(str(e))
        else:
            raise RunError(
                f"the checkpoint of {spec.name} could not be fetched ({'; '.join(faults)}). Fetch "
                f"{urls[0]} where there is a network, and give that file with --checkpoint"
            )
        with open_checkpoint(archive, prefix) as opened:
            yield opened


def _with_classifiers(network: Network, checkpoint: Checkpoint, format: Format) -> Network:
    """Gives a network the classifiers that the checkpoint has, at least the module's own."""
    main, _ = CLASSIFIERS[network.builder]
    classes = network.num_classes
    if any(name.startswith(main) for name in checkpoint.shapes):
        classes = classes or IMAGENET_CLASSES
    # In a TF2 module nothing could reach the auxiliary one: a call returns a single tensor.
    names = checkpoint.shapes if format == "hub1" else ()
    return network.with_classifiers(classes, names)


def _outputs(built: Built, main: str) -> dict[str, dict[str, Tensor]]:
    """Returns the outputs of each signature.

    Args:
      built: the network.
      main: ``features`` or ``logits``: what the signature ``default`` gives.
    """
    signatures = {"default": {"default": getattr(built, main)}}
    signatures[FEATURES] = {"default": built.features, **built.end_points}
    if built.logits is not None:
        signatures[CLASSES] = {"default": built.logits, **built.end_points}
    return signatures


def _write_hub1(network: Network, values: Values, folder: Path, main: str) -> None:
    from tensorflow.core.protobuf import saved_model_pb2

    saved_model = saved_model_pb2.SavedModel(saved_model_schema_version=1)
    tag_sets: list[list[str]] = [[]] if network.quantops else [[], ["train"]]
    for tags in tag_sets:
        saved_model.meta_graphs.append(_meta_graph(network, tags, main))
    (folder / "saved_model.pb").write_bytes(saved_model.SerializeToString(deterministic=True))
    (folder / "tfhub_module.pb").write_bytes(_HUB1_MARK)
    (folder / "variables").mkdir()
    names = sorted(values)
    tf.raw_ops.SaveV2(
        prefix=str(folder / "variables" / "variables"),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[values[name] for name in names],
    )


def _meta_graph(network: Network, tags: list[str], main: str) -> Any:
    keys = tf.compat.v1.GraphKeys
    info = tf.compat.v1.saved_model.build_tensor_info
    losses: list[Tensor] = []

    def variable(spec: VariableSpec) -> Variable:
        made = graph_variable(spec)
        if spec.l2:
            with tf.name_scope(f"{spec.name}/Regularizer/"):
                losses.append(_l2_loss(made, spec.l2))
        return made

    with tf.Graph().as_default() as graph:
        spec = network.input_spec()
        images = tf.compat.v1.placeholder(spec.dtype, spec.shape, "hub_input/images")
        built = network.build(images, variable, training="train" in tags)
        signatures = {
            name: tf.compat.v1.saved_model.build_signature_def(
                {"images": info(images)}, {key: info(t) for key, t in outputs.items()}
            )
            for name, outputs in _outputs(built, main).items()
        }
        for loss in losses:
            tf.compat.v1.add_to_collection(keys.REGULARIZATION_LOSSES, loss)
        for update in built.updates:
            tf.compat.v1.add_to_collection(keys.UPDATE_OPS, update)
        meta_graph = tf.compat.v1.train.export_meta_graph(graph=graph, strip_default_attrs=True)
    meta_graph.meta_info_def.tags.extend(tags)
    for name, signature in signatures.items():
        meta_graph.signature_def[name].CopyFrom(signature)
    attachment, image_module_info = attachment_messages()
    size = image_module_info()
    size.default_image_size.height = size.default_image_size.width = network.image_size
    attached = attachment(key=IMAGE_MODULE_INFO, value=size.SerializeToString())
    meta_graph.collection_def[ATTACHMENTS].bytes_list.value.append(attached.SerializeToString())
    return meta_graph


def _l2_loss(variable: Variable, l2: float) -> Tensor:
    return l2 * tf.nn.l2_loss(variable)


def _write_tf2(network: Network, values: Values, folder: Path, main: str) -> None:
    specs = network.variables
    variables = {
        name: tf.Variable(values[name], trainable=spec.trainable, name=name)
        for name, spec in specs.items()
    }

    def build(images: Tensor, training: bool = False) -> Built:
        return network.build(images, lambda spec: variables[spec.name], training=training)

    def call(images: Tensor, training: bool = False) -> Tensor:
        if training and network.quantops:
            tf.debugging.Assert(tf.constant(False), [_INFERENCE_ONLY])
            training = False
        return getattr(build(images, training), main)

    def signature(name: str) -> Any:
        if name == "default":
            return _function(lambda images: {name: called(images, training=False)}, images)
        return _function(lambda images: _outputs(build(images), main)[name], images)

    images = network.input_spec()
    called = tf.function(call, autograph=False)
    for training in (False, True):
        called.get_concrete_function(images, training=training)
    module = tf.train.Checkpoint()
    module.__call__ = called
    module.variables = list(variables.values())
    if network.quantops:
        module.trainable_variables, module.regularization_losses = [], []
    else:
        # Only what a call reaches is trained: of a module that gives features, not the classifier.
        classifier, _ = CLASSIFIERS[network.builder]
        reached = [
            spec
            for name, spec in specs.items()
            if spec.trainable and (main == "logits" or not name.startswith(classifier))
        ]
        decay = _function(
            lambda: tf.add_n([_l2_loss(variables[s.name], s.l2) for s in reached if s.l2])
        )
        decay.get_concrete_function()
        module.trainable_variables = [variables[spec.name] for spec in reached]
        module.regularization_losses = [decay]
    names = ["default", FEATURES, *([CLASSES] if network.num_classes else [])]
    tf.saved_model.save(module, str(folder), {name: signature(name) for name in names})


def _function(function: Callable[..., Any], *inputs: tf.TensorSpec) -> Any:
    return tf.function(function, input_signature=inputs, autograph=False)
