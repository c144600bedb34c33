"""The quantised form of a network: batch norm folded, weights and activations fake-quantised.

This is the inference graph that TensorFlow 1's ``contrib.quantize`` made of a TF-Slim network, and
what a *quantops* module holds. All values stay float32, but weights and activations are rounded to
the 256 (weights: 255) levels that an integer kernel will have, so that the graph computes what the
uint8 TFLite model made of it computes. Source: Jacob et al. 2018, "Quantization and Training of
Neural Networks for Efficient Integer-Arithmetic-Only Inference", arXiv:1712.05877.
"""

import math
from collections.abc import Callable

import tensorflow as tf

from hubbeam.modules.errors import ConfigError
from hubbeam.modules.networks.layers import (
    Activation,
    Layers,
    Tensor,
    Variable,
    VariableSpec,
)

WEIGHTS = "weights_quant"
ACTIVATIONS = "act_quant"


class QuantizedLayers(Layers):
    """Layers with folded batch norm and fake quantisation, for inference alone.

    Each convolution has four more variables, scalars of its *operation* scope, as
    ``contrib.quantize`` names them: ``weights_quant/min`` and ``max`` for its (folded) weights, of
    which level 0 is not used, and ``act_quant/min`` and ``max`` for what it passes on, after the
    activation. Biases, the network's input and poolings are not fake-quantised.
    """

    def __init__(self, variables: Callable[[VariableSpec], Variable], *, training: bool = False):
        """Starts like `Layers`.

        Args:
          variables: gives the variable of a spec; asked once for each name.
          training: must be False.

        Raises:
          ConfigError: the training graph was asked for.
        """
        if training:
            raise ConfigError(
                "a quantops module has no graph for training (tag set {'train'}): its ranges were "
                "learned with it; fine-tune the module of the same name without quantops"
            )
        super().__init__(variables)

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
        """Convolves with folded, fake-quantised weights; fake-quantises what comes out."""
        weights = tf.convert_to_tensor(weights)
        height, width, channels, filters = weights.shape
        outputs = channels * filters if depthwise else filters
        biases = None
        if norm:
            with self.scope(norm):
                gamma, beta, mean, variance = self.batch_norm_variables(outputs)
            with tf.name_scope("BatchNorm_Fold"):
                factor = gamma * tf.math.rsqrt(variance + self.norm.epsilon)
                biases = beta - mean * factor
                weights *= tf.reshape(factor, (channels, filters)) if depthwise else factor
        elif bias:
            biases = self.variable("biases", (outputs,))
        # What an untrained network needs: its weights are uniform within this reach.
        reach = math.sqrt(6.0 / (height * width * (1 if depthwise else channels)))
        weights = self._fake_quantize(weights, WEIGHTS, -reach, reach, narrow_range=True)
        x = convolve(x, weights)
        if biases is not None:
            x = tf.nn.bias_add(x, biases)
        if activation:
            x = activation(x)
        return self._fake_quantize(x, ACTIVATIONS, 0.0 if activation else -6.0, 6.0)

    def _fake_quantize(
        self, x: Tensor, name: str, low: float, high: float, *, narrow_range: bool = False
    ) -> Tensor:
        limits = [
            self._variables(
                VariableSpec(f"{self._operations}{name}/{end}", (), trainable=False, fill=fill)
            )
            for end, fill in (("min", low), ("max", high))
        ]
        with tf.name_scope(name):
            return tf.quantization.fake_quant_with_min_max_vars(
                x, *limits, num_bits=8, narrow_range=narrow_range
            )
