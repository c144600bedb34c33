"""MobileNet V1 as TF-Slim has it.

Source: Howard et al. 2017, "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision
Applications", table 1. The same function builds the quantised network from `QuantizedLayers`.
"""

import tensorflow as tf

from hubbeam.modules.networks.layers import Layers, Norm, Outputs, Tensor, round_to_multiple

# (channels, stride) of the separable convolutions 1 to 13; the stride is the depthwise part's.
BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)


def mobilenet_v1(
    layers: Layers,
    images: Tensor,
    *,
    num_classes: int | None = None,
    depth_multiplier: float = 1.0,
) -> Outputs:
    """Builds the network.

    Args:
      layers: where layers and variables come from; `QuantizedLayers` for the quantops form.
      images: float32 [n, height, width, 3] in [0, 1], the size known.
      num_classes: width of the logits; None or 0 for no classifier.
      depth_multiplier: factor of all channel counts, which are rounded to multiples of 8 (as they
        are anyway with the published 0.25, 0.5, 0.75 and 1).

    Returns:
      Features [n, 1024 * depth_multiplier] and logits.
    """
    layers.norm = Norm(epsilon=0.001, decay=0.9997)
    layers.l2 = 0.00004

    x = layers.scale_input(images)
    with layers.scope("MobilenetV1"):
        # TF-Slim enters this scope twice: its operations have the name in front of them twice.
        with layers.operation_scope("MobilenetV1"):
            channels = round_to_multiple(32 * depth_multiplier)
            x = layers.conv2d(x, channels, 3, name="Conv2d_0", stride=2, activation=tf.nn.relu6)
            layers.end_point("MobilenetV1/Conv2d_0", x)
            for i, (channels, stride) in enumerate(BLOCKS, start=1):
                name = f"Conv2d_{i}_depthwise"
                x = layers.depthwise_conv2d(x, 3, name=name, stride=stride, activation=tf.nn.relu6)
                layers.end_point(f"MobilenetV1/{name}", x)
                channels = round_to_multiple(channels * depth_multiplier)
                name = f"Conv2d_{i}_pointwise"
                x = layers.conv2d(x, channels, 1, name=name, activation=tf.nn.relu6)
                layers.end_point(f"MobilenetV1/{name}", x)
        with layers.scope("Logits"):
            x = layers.end_point("MobilenetV1/global_pool", layers.global_pool(x))
            features = tf.squeeze(x, [1, 2])
            if not num_classes:
                return Outputs(features, None)
            x = layers.dropout(x, keep=0.999)
            x = layers.conv2d(x, num_classes, 1, name="Conv2d_1c_1x1", norm=None, bias=True)
            return Outputs(features, tf.squeeze(x, [1, 2]))
