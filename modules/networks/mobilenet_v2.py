"""MobileNet V2: inverted residuals with linear bottlenecks (Sandler et al. 2018, arXiv:1801.04381).

A block widens its thin input by a 1x1 convolution, filters each channel by itself, and projects to
a thin output without an activation; thin ends of equal shape are joined by a residual connection.
"""

import tensorflow as tf

from hubbeam.modules.networks.layers import Layers, Norm, Outputs, Tensor, round_to_multiple

# Output channels and stride of each block (the paper's table 2), before the depth multiplier.
BLOCKS = (
    (16, 1),
    (24, 2), (24, 1),
    (32, 2), (32, 1), (32, 1),
    (64, 2), (64, 1), (64, 1), (64, 1),
    (96, 1), (96, 1), (96, 1),
    (160, 2), (160, 1), (160, 1),
    (320, 1),
)  # fmt: skip
EXPANSION = 6


def mobilenet_v2(
    layers: Layers,
    images: Tensor,
    *,
    num_classes: int | None = None,
    depth_multiplier: float = 1.0,
) -> Outputs:
    """Builds MobileNet V2 with TF-Slim's variable names and end points.

    Args:
      layers: what to build with.
      images: float32 [n, height, width, 3] in [0, 1], the size known.
      num_classes: width of the logits; None or 0 for no classifier.
      depth_multiplier: factor of all channel counts, which are rounded to multiples of 8. The last
        convolution is never narrower than 1280.

    Returns:
      Features [n, 1280 or more] and logits.
    """
    layers.norm = Norm(epsilon=0.001, decay=0.997, scale=True)
    layers.l2 = 4e-5
    with layers.scope("MobilenetV2"):
        x = tf.identity(layers.scale_input(images), "input")
        channels = round_to_multiple(32 * depth_multiplier)
        x = layers.conv2d(x, channels, 3, name="Conv", stride=2, activation=tf.nn.relu6)
        layers.end_point("MobilenetV2/layer_1", x)
        for i, (channels, stride) in enumerate(BLOCKS):
            x = _block(
                layers,
                x,
                round_to_multiple(channels * depth_multiplier),
                stride=stride,
                expansion=EXPANSION if i else 1,
                name=f"expanded_conv_{i}" if i else "expanded_conv",
                end_point=f"MobilenetV2/layer_{i + 2}",
            )
        channels = round_to_multiple(1280 * max(depth_multiplier, 1.0))
        x = layers.conv2d(x, channels, 1, name="Conv_1", activation=tf.nn.relu6, gain=1.0)
        layers.end_point(f"MobilenetV2/layer_{len(BLOCKS) + 2}", x)
        with layers.scope("Logits"):
            x = layers.end_point("MobilenetV2/global_pool", layers.global_pool(x))
            features = tf.squeeze(x, [1, 2])
            if not num_classes:
                return Outputs(features, None)
            x = layers.dropout(x, keep=0.8)
            x = layers.conv2d(x, num_classes, 1, name="Conv2d_1c_1x1", norm=None, bias=True)
            return Outputs(features, tf.squeeze(x, [1, 2]))


def _block(
    layers: Layers,
    x: Tensor,
    channels: int,
    *,
    stride: int,
    expansion: int,
    name: str,
    end_point: str,
) -> Tensor:
    with layers.scope(name):
        thin = x
        if expansion > 1:
            wide = round_to_multiple(expansion * int(x.shape[-1]))
            x = layers.conv2d(x, wide, 1, name="expand", activation=tf.nn.relu6, gain=1.0)
            layers.end_point(f"{end_point}/expansion_output", x)
        x = layers.depthwise_conv2d(x, 3, name="depthwise", stride=stride, activation=tf.nn.relu6)
        layers.end_point(f"{end_point}/depthwise_output", x)
        x = layers.conv2d(x, channels, 1, name="project")
        if stride == 1 and int(thin.shape[-1]) == channels:
            x += thin
        layers.end_point(f"{end_point}/output", x)
        return layers.end_point(end_point, x)
