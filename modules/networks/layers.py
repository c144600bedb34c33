"""The layers that the networks are written with.

A network is a plain function that calls the methods of one `Layers` object. The object knows where
variables come from, whether the training or the inference graph is being built, and what has been
collected on the way: named end points and the updates of the batch-norm statistics. So one network
function serves the TF1 graph of a Hub module and the `tf.function` of a TF2 SavedModel, with or
without training, and (with `quantize.QuantizedLayers` in place of `Layers`) its quantised form.

Variable names are TF-Slim's: the path of the enclosing scopes, the layer's own name, and then
``weights``, ``depthwise_weights``, ``pointwise_weights``, ``biases`` or ``BatchNorm/gamma`` etc.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import tensorflow as tf

Tensor = Any  # tf.Tensor; TensorFlow carries no types
Variable = Any  # tf.Variable
Activation = Callable[[Tensor], Tensor]


class VariableSpec(NamedTuple):
    """What a network needs to know of one of its variables, before it has a value.

    Attributes:
      name: TF-Slim's name, without ``:0``.
      shape: all float32.
      trainable: False for batch-norm statistics and other state.
      fan_in: how many inputs are summed for one output, for weights; None for all other variables.
      gain: of weights: before training their variance is ``gain / fan_in``, which keeps the scale
        of activations (He et al. 2015): 2 where the input comes from a rectifier, else 1.
      fill: the initial value of variables that are not weights.
      l2: weight decay: ``l2 * sum(w**2) / 2`` is added to the training loss; 0 for none.
    """

    name: str
    shape: tuple[int, ...]
    trainable: bool = True
    fan_in: int | None = None
    gain: float = 2.0
    fill: float = 0.0
    l2: float = 0.0


class Norm(NamedTuple):
    """Settings of a network's batch normalisation (Ioffe and Szegedy 2015).

    Attributes:
      epsilon: added to the variance.
      decay: share of the old value in the moving statistics, per training step.
      scale: whether there is a learned factor ``gamma`` (``beta`` is always there).
    """

    epsilon: float = 0.001
    decay: float = 0.99
    scale: bool = True


class Outputs(NamedTuple):
    """What a network returns.

    Attributes:
      features: float32 [n, width], the pooled vector before the classifier.
      logits: float32 [n, num_classes], or None where the network has no classifier.
    """

    features: Tensor
    logits: Tensor | None


class Layers:
    """Builds layers, with their variables, in the current graph or `tf.function`.

    Attributes:
      training: True builds the training graph: batch norm on batch statistics, dropout.
      norm: batch-norm settings of all following layers; a network sets its own.
      l2: weight decay of all following weights; a network sets its own.
      end_points: named inner tensors, in the order in which the network computes them.
      updates: training only: the operations that move the batch-norm statistics.
    """

    def __init__(self, variables: Callable[[VariableSpec], Variable], *, training: bool = False):
        """Starts with no scope and no end points.

        Args:
          variables: gives the variable of a spec; asked once for each name.
          training: see the attribute.
        """
        self.training = training
        self.norm = Norm()
        self.l2 = 0.0
        self.end_points: dict[str, Tensor] = {}
        self.updates: list[Any] = []
        self._variables = variables
        self._scope = ""
        self._operations = ""

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefixes the names of variables and operations made inside with ``name/``."""
        outer = self._scope
        self._scope = f"{outer}{name}/"
        try:
            with self.operation_scope(name):
                yield
        finally:
            self._scope = outer

    @contextmanager
    def operation_scope(self, name: str) -> Iterator[None]:
        """Prefixes the names of operations alone, where TF-Slim has them in a deeper scope."""
        outer = self._operations
        self._operations = f"{outer}{name}/"
        try:
            with tf.name_scope(self._operations):  # the final slash makes it absolute
                yield
        finally:
            self._operations = outer

    def variable(self, name: str, shape: tuple[int, ...], **kwargs: Any) -> Variable:
        """Gets the variable `name` of the present scope; `kwargs` as in `VariableSpec`."""
        return self._variables(VariableSpec(self._scope + name, tuple(shape), **kwargs))

    def end_point(self, name: str, tensor: Tensor) -> Tensor:
        """Records an inner tensor under `name` (taken as it is, without scope); returns it."""
        self.end_points[name] = tensor
        return tensor

    def scale_input(self, images: Tensor) -> Tensor:
        """Maps pixels from [0, 1] (the images of TF-Hub) to [-1, 1] (the input of TF-Slim)."""
        with tf.name_scope("hub_input/"):
            return images * 2.0 - 1.0

    # Convolutions. `norm` is the batch norm's name below the layer's, or None for no batch norm.

    def conv2d(
        self,
        x: Tensor,
        filters: int,
        size: int | tuple[int, int],
        *,
        name: str,
        stride: int = 1,
        padding: str = "SAME",
        norm: str | None = "BatchNorm",
        bias: bool = False,
        activation: Activation | None = None,
        gain: float = 2.0,
    ) -> Tensor:
        """Convolution, then batch norm or bias (or neither), then activation.

        Args:
          x: float32 [n, h, w, c].
          filters: number of output channels.
          size: height and width of the kernel.
          name: the layer's name below the present scope.
          stride: in both directions.
          padding: ``SAME`` or ``VALID``.
          norm: name of the batch norm, None for none.
          bias: whether biases are added; never together with `norm`.
          activation: applied last.
          gain: see `VariableSpec`.

        Returns:
          float32 [n, h', w', filters].
        """
        height, width = (size, size) if isinstance(size, int) else size
        channels = int(x.shape[-1])
        with self.scope(name):
            weights = self.variable(
                "weights",
                (height, width, channels, filters),
                fan_in=height * width * channels,
                gain=gain,
                l2=self.l2,
            )
            return self.unit(
                x,
                weights,
                lambda x, w: tf.nn.conv2d(x, w, stride, padding),
                norm=norm,
                bias=bias,
                activation=activation,
            )

    def depthwise_conv2d(
        self,
        x: Tensor,
        size: int,
        *,
        name: str,
        stride: int = 1,
        padding: str = "SAME",
        norm: str | None = "BatchNorm",
        activation: Activation | None = None,
    ) -> Tensor:
        """Convolution of every channel by itself, without weight decay; see `conv2d`."""
        channels = int(x.shape[-1])
        with self.scope(name):
            weights = self.variable(
                "depthwise_weights", (size, size, channels, 1), fan_in=size * size
            )
            return self.unit(
                x,
                weights,
                lambda x, w: tf.nn.depthwise_conv2d(x, w, [1, stride, stride, 1], padding),
                norm=norm,
                bias=False,
                activation=activation,
                depthwise=True,
            )

    def separable_conv2d(
        self,
        x: Tensor,
        filters: int,
        size: int,
        *,
        name: str,
        stride: int = 1,
        multiplier: int = 1,
        norm: str | None = None,
        bias: bool = False,
        activation: Activation | None = None,
    ) -> Tensor:
        """Depthwise, then 1x1 convolution with nothing in between (Chollet 2016); see `conv2d`.

        Args:
          x: float32 [n, h, w, c].
          filters: number of output channels.
          size: height and width of the depthwise kernel.
          name: the layer's name below the present scope.
          stride: of the depthwise convolution.
          multiplier: how many channels the depthwise convolution makes of each.
          norm: name of the batch norm, None for none.
          bias: whether biases are added.
          activation: applied last.

        Returns:
          float32 [n, ceil(h / stride), ceil(w / stride), filters].
        """
        channels = int(x.shape[-1])
        with self.scope(name):
            depthwise = self.variable(
                "depthwise_weights",
                (size, size, channels, multiplier),
                fan_in=size * size,
                l2=self.l2,
            )
            pointwise = self.variable(
                "pointwise_weights",
                (1, 1, channels * multiplier, filters),
                fan_in=channels * multiplier,
                gain=1.0,
                l2=self.l2,
            )
            x = tf.nn.depthwise_conv2d(x, depthwise, [1, stride, stride, 1], "SAME")
            return self.unit(
                x,
                pointwise,
                lambda x, w: tf.nn.conv2d(x, w, 1, "SAME"),
                norm=norm,
                bias=bias,
                activation=activation,
            )

    def unit(
        self,
        x: Tensor,
        weights: Variable,
        convolve: Callable[[Tensor, Tensor], Tensor],
        *,
        norm: str | None,
        bias: bool,
        activation: Activation | None,
        depthwise: bool = False,
    ) -> Tensor:
        """Convolves, normalises, activates: the one place that a quantised form overrides.

        Args:
          x: float32 [n, h, w, c].
          weights: what `convolve` takes; the last axis but one and the last are the channels.
          convolve: of (x, weights).
          norm: name of the batch norm, None for none.
          bias: whether biases are added.
          activation: applied last.
          depthwise: whether each channel is convolved by itself.

        Returns:
          float32 [n, h', w', filters].
        """
        x = convolve(x, tf.convert_to_tensor(weights))
        if norm:
            x = self.batch_norm(x, name=norm)
        elif bias:
            x = tf.nn.bias_add(x, self.variable("biases", (int(x.shape[-1]),)))
        return activation(x) if activation else x

    def batch_norm_variables(
        self, channels: int
    ) -> tuple[Tensor | Variable, Variable, Variable, Variable]:
        """Gets gamma (ones where `norm` has no scale), beta, mean and variance of the scope."""
        shape = (channels,)
        gamma = self.variable("gamma", shape, fill=1.0) if self.norm.scale else tf.ones(shape)
        beta = self.variable("beta", shape)
        mean = self.variable("moving_mean", shape, trainable=False)
        variance = self.variable("moving_variance", shape, trainable=False, fill=1.0)
        return gamma, beta, mean, variance

    def batch_norm(self, x: Tensor, *, name: str) -> Tensor:
        """Batch normalisation over all axes but the last: by the moving statistics for inference.

        For training by the batch's own, and the update of the moving ones is put into `updates`
        (inside a `tf.function` it runs by itself).
        """
        with self.scope(name):
            gamma, beta, mean, variance = self.batch_norm_variables(int(x.shape[-1]))
            norm = tf.compat.v1.nn.fused_batch_norm
            if not self.training:
                x, _, _ = norm(
                    x,
                    gamma,
                    beta,
                    mean=mean,
                    variance=variance,
                    epsilon=self.norm.epsilon,
                    is_training=False,
                )
                return x
            x, batch_mean, batch_variance = norm(
                x, gamma, beta, epsilon=self.norm.epsilon, is_training=True
            )
            for moving, batch in ((mean, batch_mean), (variance, batch_variance)):
                step = (moving - batch) * (1.0 - self.norm.decay)
                self.updates.append(moving.assign_sub(step, read_value=False))
            return x

    def fully_connected(self, x: Tensor, outputs: int, *, name: str) -> Tensor:
        """Matrix product and biases: [n, c] to [n, outputs]."""
        channels = int(x.shape[-1])
        with self.scope(name):
            weights = self.variable("weights", (channels, outputs), fan_in=channels, l2=self.l2)
            biases = self.variable("biases", (outputs,))
            return tf.nn.bias_add(tf.matmul(x, weights), biases)

    def max_pool(self, x: Tensor, size: int, stride: int, padding: str = "SAME") -> Tensor:
        """Maximum over windows of `size` by `size`."""
        return tf.nn.max_pool2d(x, size, stride, padding)

    def avg_pool(self, x: Tensor, size: int, stride: int, padding: str = "SAME") -> Tensor:
        """Mean over windows of `size` by `size`, the padding not counted."""
        return tf.nn.avg_pool2d(x, size, stride, padding)

    def global_pool(self, x: Tensor) -> Tensor:
        """Mean over the whole picture: [n, h, w, c] to [n, 1, 1, c]."""
        return tf.nn.avg_pool2d(x, x.shape[1:3], 1, "VALID")

    def dropout(self, x: Tensor, keep: float) -> Tensor:
        """Training only: zeroes a share ``1 - keep`` of the elements, scales up the others."""
        return tf.nn.dropout(x, rate=1.0 - keep) if self.training else x

    def drop_path(self, x: Tensor, keep: float) -> Tensor:
        """Training only: zeroes whole examples with probability ``1 - keep``, scales up the rest.

        Source: Larsson et al. 2016, as used by NASNet (Zoph et al. 2017).
        """
        if not self.training:
            return x
        kept = tf.floor(keep + tf.random.uniform([tf.shape(x)[0], 1, 1, 1]))
        return x / keep * kept


def round_to_multiple(channels: float, divisor: int = 8) -> int:
    """Rounds a scaled number of channels to a multiple, never below 90 % of it.

    Source: the MobileNet papers' reference networks.
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded
