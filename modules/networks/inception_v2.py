"""Inception V2 as TF-Slim has it (Ioffe and Szegedy 2015, arXiv:1502.03167).

Differs from the paper's figure in its first layer, a 7x7 separable convolution with biases and no
batch norm. Batch norm has no factor gamma here: a ReLU follows, and the next weights can scale.
"""

import tensorflow as tf

from hubbeam.modules.networks.layers import Layers, Norm, Outputs, Tensor

# Channels of the blocks that keep the size: the 1x1 branch; the 1x1 and 3x3 of the second; the 1x1
# and both 3x3 of the third (the paper's "double 3x3"); the 1x1 after the pool, and which pool.
SAME = {
    "Mixed_3b": (64, (64, 64), (64, 96), 32, "Avg"),
    "Mixed_3c": (64, (64, 96), (64, 96), 64, "Avg"),
    "Mixed_4b": (224, (64, 96), (96, 128), 128, "Avg"),
    "Mixed_4c": (192, (96, 128), (96, 128), 128, "Avg"),
    "Mixed_4d": (160, (128, 160), (128, 160), 96, "Avg"),
    "Mixed_4e": (96, (128, 192), (160, 192), 96, "Avg"),
    "Mixed_5b": (352, (192, 320), (160, 224), 128, "Avg"),
    "Mixed_5c": (352, (192, 320), (192, 224), 128, "Max"),
}
# Channels of the blocks that halve the size: 1x1 and 3x3; 1x1 and both 3x3; a pool has none.
HALF = {
    "Mixed_4a": ((128, 160), (64, 96)),
    "Mixed_5a": ((128, 192), (192, 256)),
}


def inception_v2(layers: Layers, images: Tensor, *, num_classes: int | None = None) -> Outputs:
    """Builds Inception V2 with TF-Slim's variable names and end points.

    Args:
      layers: what to build with.
      images: float32 [n, height, width, 3] in [0, 1], the size known.
      num_classes: width of the logits; None or 0 for no classifier.

    Returns:
      Features [n, 1024] and logits.
    """
    layers.norm = Norm(epsilon=0.001, decay=0.9997, scale=False)

    def end_point(name: str, x: Tensor) -> Tensor:
        return layers.end_point(f"InceptionV2/{name}", x)

    with layers.scope("InceptionV2"):
        x = layers.scale_input(images)
        x = layers.separable_conv2d(
            x, 64, 7, name="Conv2d_1a_7x7", stride=2, multiplier=8, bias=True,
            activation=tf.nn.relu,
        )  # fmt: skip
        layers.l2 = 4e-5  # from here on: the first layer has no weight decay
        end_point("Conv2d_1a_7x7", x)
        x = end_point("MaxPool_2a_3x3", layers.max_pool(x, 3, 2))
        x = end_point("Conv2d_2b_1x1", _conv(layers, x, 64, 1, "Conv2d_2b_1x1"))
        x = end_point("Conv2d_2c_3x3", _conv(layers, x, 192, 3, "Conv2d_2c_3x3"))
        x = end_point("MaxPool_3a_3x3", layers.max_pool(x, 3, 2))
        for name in sorted({*SAME, *HALF}):  # the names sort in the network's order
            with layers.scope(name):
                x = end_point(name, (_same if name in SAME else _half)(layers, x, name))
        with layers.scope("Logits"):
            x = end_point("AvgPool_1a", layers.global_pool(x))
            features = tf.squeeze(x, [1, 2])
            if not num_classes:
                return Outputs(features, None)
            x = layers.dropout(x, keep=0.8)
            x = layers.conv2d(x, num_classes, 1, name="Conv2d_1c_1x1", norm=None, bias=True)
            return Outputs(features, tf.squeeze(x, [1, 2]))


def _conv(layers: Layers, x: Tensor, filters: int, size: int, name: str, stride: int = 1) -> Tensor:
    return layers.conv2d(x, filters, size, name=name, stride=stride, activation=tf.nn.relu)


def _same(layers: Layers, x: Tensor, name: str) -> Tensor:
    one, (two_1x1, two_3x3), (three_1x1, three_3x3), four, pool = SAME[name]
    with layers.scope("Branch_0"):
        a = _conv(layers, x, one, 1, "Conv2d_0a_1x1")
    with layers.scope("Branch_1"):
        b = _conv(layers, x, two_1x1, 1, "Conv2d_0a_1x1")
        b = _conv(layers, b, two_3x3, 3, "Conv2d_0b_3x3")
    with layers.scope("Branch_2"):
        c = _conv(layers, x, three_1x1, 1, "Conv2d_0a_1x1")
        c = _conv(layers, c, three_3x3, 3, "Conv2d_0b_3x3")
        c = _conv(layers, c, three_3x3, 3, "Conv2d_0c_3x3")
    with layers.scope("Branch_3"):
        d = (layers.avg_pool if pool == "Avg" else layers.max_pool)(x, 3, 1)
        d = _conv(layers, d, four, 1, "Conv2d_0b_1x1")
    return tf.concat([a, b, c, d], axis=3)


def _half(layers: Layers, x: Tensor, name: str) -> Tensor:
    (one_1x1, one_3x3), (two_1x1, two_3x3) = HALF[name]
    with layers.scope("Branch_0"):
        a = _conv(layers, x, one_1x1, 1, "Conv2d_0a_1x1")
        a = _conv(layers, a, one_3x3, 3, "Conv2d_1a_3x3", stride=2)
    with layers.scope("Branch_1"):
        b = _conv(layers, x, two_1x1, 1, "Conv2d_0a_1x1")
        b = _conv(layers, b, two_3x3, 3, "Conv2d_0b_3x3")
        b = _conv(layers, b, two_3x3, 3, "Conv2d_1a_3x3", stride=2)
    with layers.scope("Branch_2"):
        c = layers.max_pool(x, 3, 2)
    return tf.concat([a, b, c], axis=3)
