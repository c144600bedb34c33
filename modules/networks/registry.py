"""The networks by the names that module descriptions use."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import tensorflow as tf

from hubbeam.modules.errors import ConfigError
from hubbeam.modules.networks.inception_v2 import inception_v2
from hubbeam.modules.networks.layers import Layers, Outputs, Tensor, Variable, VariableSpec
from hubbeam.modules.networks.mobilenet_v1 import mobilenet_v1
from hubbeam.modules.networks.mobilenet_v2 import mobilenet_v2
from hubbeam.modules.networks.nasnet import nasnet_mobile
from hubbeam.modules.networks.quantize import QuantizedLayers

BUILDERS: dict[str, Callable[..., Outputs]] = {
    "inception_v2": inception_v2,
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v2": mobilenet_v2,
    "nasnet_mobile": nasnet_mobile,
}
# Where the variables of the classifiers are: those of the main, and of the auxiliary one.
CLASSIFIERS = {
    "inception_v2": ("InceptionV2/Logits/", None),
    "mobilenet_v1": ("MobilenetV1/Logits/", None),
    "mobilenet_v2": ("MobilenetV2/Logits/", None),
    "nasnet_mobile": ("final_layer/", "aux_7/"),
}


class Built(NamedTuple):
    """A network in a graph.

    Attributes:
      features: float32 [n, width].
      logits: float32 [n, classes], or None without a classifier.
      end_points: inner tensors under TF-Slim's names.
      updates: operations that move the batch-norm statistics, of the training graph.
    """

    features: Tensor
    logits: Tensor | None
    end_points: dict[str, Tensor]
    updates: list[Any]


class Declared(NamedTuple):
    """A network in a TF1 graph of its own.

    Attributes:
      variables: what it asked for, by name, in the order of use.
      graph: the graph, with variables without values.
      built: its tensors there.
    """

    variables: dict[str, VariableSpec]
    graph: tf.Graph
    built: Built


class Network:
    """One network with its arguments: builds itself into any graph, and lists its variables."""

    def __init__(
        self,
        builder: str,
        args: Mapping[str, Any] | None = None,
        *,
        image_size: int,
        num_classes: int | None = None,
        quantops: bool = False,
    ):
        """Looks the builder up.

        Args:
          builder: a key of `BUILDERS`.
          args: its further arguments (``depth_multiplier`` …).
          image_size: height and width of the input in pixels.
          num_classes: width of the logits, None for no classifier.
          quantops: with folded batch norm and fake quantisation; has no training graph.

        Raises:
          ConfigError: no such builder, or it does not take the arguments.
        """
        if builder not in BUILDERS:
            raise ConfigError(f"no network is named {builder!r}; there are {', '.join(BUILDERS)}")
        self.builder = builder
        self.args = dict(args or {})
        self.image_size = image_size
        self.num_classes = num_classes
        self.quantops = quantops
        self._takes = set(inspect.signature(BUILDERS[builder]).parameters) - {
            "layers", "images", "num_classes",
        }  # fmt: skip
        if unknown := sorted(set(self.args) - self._takes):
            raise ConfigError(
                f"network {builder} takes no argument {', '.join(unknown)}; "
                f"it takes {', '.join(sorted(self._takes)) or 'none'}"
            )

    def with_classifiers(self, num_classes: int | None, names: Iterable[str]) -> "Network":
        """Returns the same network with the classifiers that there are values for.

        Args:
          num_classes: width of the logits, None for no classifier.
          names: of variables that have values.
        """
        _, auxiliary = CLASSIFIERS[self.builder]
        args = {k: v for k, v in self.args.items() if k != "auxiliary"}
        if num_classes and auxiliary and any(name.startswith(auxiliary) for name in names):
            args["auxiliary"] = True
        return Network(
            self.builder,
            args,
            image_size=self.image_size,
            num_classes=num_classes,
            quantops=self.quantops,
        )

    def build(
        self,
        images: Tensor,
        variables: Callable[[VariableSpec], Variable],
        *,
        training: bool = False,
    ) -> Built:
        """Builds the network in the current graph.

        Args:
          images: float32 [n, image_size, image_size, 3] in [0, 1].
          variables: gives the variable of a spec.
          training: whether the training graph is built.

        Raises:
          ConfigError: the training graph of a quantops network was asked for.
        """
        layers = (QuantizedLayers if self.quantops else Layers)(variables, training=training)
        outputs = BUILDERS[self.builder](layers, images, num_classes=self.num_classes, **self.args)
        return Built(outputs.features, outputs.logits, layers.end_points, layers.updates)

    def input_spec(self) -> tf.TensorSpec:
        """Returns the type and shape of the images."""
        return tf.TensorSpec([None, self.image_size, self.image_size, 3], tf.float32, "images")

    @property
    def variables(self) -> dict[str, VariableSpec]:
        """All variables of its graphs by name, in the order of use."""
        return self._declared.variables

    @property
    def width(self) -> int:
        """Number of values in the feature vector."""
        return int(self._declared.built.features.shape[1])

    @cached_property
    def _declared(self) -> "Declared":
        # Only the auxiliary classifier has variables that the inference graph lacks.
        return self.declare(training=bool(self.args.get("auxiliary")))

    def declare(self, *, training: bool = False) -> "Declared":
        """Builds the network in a new graph, to see what it needs and what it is."""
        specs: dict[str, VariableSpec] = {}

        def declared(spec: VariableSpec) -> Variable:
            specs[spec.name] = spec
            return graph_variable(spec)

        with tf.Graph().as_default() as graph:
            images = tf.compat.v1.placeholder(tf.float32, self.input_spec().shape, "images")
            return Declared(specs, graph, self.build(images, declared, training=training))


def graph_variable(spec: VariableSpec) -> Variable:
    """Makes the variable of a spec in the current TF1 graph, in the collections TF-Slim uses."""
    keys = tf.compat.v1.GraphKeys
    return tf.compat.v1.get_variable(
        spec.name,
        spec.shape,
        tf.float32,
        initializer=tf.compat.v1.constant_initializer(spec.fill),
        trainable=spec.trainable,
        collections=[keys.GLOBAL_VARIABLES, keys.MODEL_VARIABLES],
        use_resource=True,
    )
