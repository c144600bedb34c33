"""NASNet-A, the mobile ImageNet form (Zoph et al. 2017, arXiv:1707.07012), as TF-Slim has it.

The network is a stack of two kinds of cells that an architecture search found (the paper's figure
4). A cell has two inputs, its predecessor's output and the one before that; it makes five new
states, each the sum of two operations on earlier states, and concatenates all that nothing used.
"""

import tensorflow as tf

from hubbeam.modules.networks.layers import Layers, Norm, Outputs, Tensor

# A cell's five states: (operation, which state) left and right. States 0 and 1 are the cell's
# inputs, the newer one first; 2 to 6 are made here.
NORMAL = (
    (("separable_5x5", 0), ("separable_3x3", 1)),
    (("separable_5x5", 1), ("separable_3x3", 1)),
    (("avg_pool", 0), ("none", 1)),
    (("avg_pool", 1), ("avg_pool", 1)),
    (("separable_3x3", 0), ("none", 0)),
)
REDUCTION = (
    (("separable_5x5", 0), ("separable_7x7", 1)),
    (("max_pool", 0), ("separable_7x7", 1)),
    (("avg_pool", 0), ("separable_5x5", 1)),
    (("none", 3), ("avg_pool", 2)),
    (("separable_3x3", 2), ("max_pool", 0)),
)
# How many of the first states are left out of a cell's output. TF-Slim drops exactly these.
LEFT_OUT = {NORMAL: 1, REDUCTION: 3}
# Every state is a sum of two: untrained weights behind it halve the variance again.
SUM_GAIN = 1.0

CELLS = 12
FILTERS = 44
REDUCTIONS = (4, 8)  # a reduction cell stands before each of these normal cells
AUXILIARY = 7  # the auxiliary classifier hangs on this normal cell
ALL_CELLS = CELLS + len(REDUCTIONS) + 2  # two reduction cells are the stem


def nasnet_mobile(
    layers: Layers,
    images: Tensor,
    *,
    num_classes: int | None = None,
    auxiliary: bool = False,
    drop_path_keep: float = 1.0,
) -> Outputs:
    """Builds NASNet-A mobile with TF-Slim's variable names and end points.

    Args:
      layers: what to build with.
      images: float32 [n, height, width, 3] in [0, 1], the size known.
      num_classes: width of the logits; None or 0 for no classifier.
      auxiliary: training only: adds the auxiliary classifier, if there is a classifier; its logits
        [n, num_classes] are the end point ``AuxLogits``.
      drop_path_keep: training only: probability to keep an operation's result in the last cell; in
        earlier cells it comes nearer to 1 in proportion. This is the final rate, not scaled by
        training steps. TF-Slim trained the mobile network with 1 (nothing dropped), the
        large one with 0.7.

    Returns:
      Features [n, 1056] and logits.
    """
    layers.norm = Norm(epsilon=0.001, decay=0.9997, scale=True)
    layers.l2 = 4e-5
    built = 0

    def cell(name: str, states: tuple, filters: int, x: Tensor, previous: Tensor | None) -> Tensor:
        nonlocal built
        built += 1
        keep = 1.0 - (1.0 - drop_path_keep) * built / ALL_CELLS
        with layers.scope(name):
            return _cell(layers, states, filters, x, previous, keep)

    x = layers.scale_input(images)
    x = layers.conv2d(x, 32, 3, name="conv0", stride=2, padding="VALID", norm=None)
    x = layers.batch_norm(x, name="conv0_bn")
    previous, x = x, cell("cell_stem_0", REDUCTION, FILTERS // 4, x, None)
    previous, x = x, cell("cell_stem_1", REDUCTION, FILTERS // 2, x, previous)
    layers.end_point("Stem", x)
    filters = FILTERS
    for i in range(CELLS):
        if i in REDUCTIONS:
            filters *= 2
            k = REDUCTIONS.index(i)
            previous, x = x, cell(f"reduction_cell_{k}", REDUCTION, filters, x, previous)
            layers.end_point(f"Reduction_Cell_{k}", x)
        previous, x = x, cell(f"cell_{i}", NORMAL, filters, x, previous)
        layers.end_point(f"Cell_{i}", x)
        if i == AUXILIARY and auxiliary and num_classes and layers.training:
            with layers.scope(f"aux_{i}"), layers.scope("aux_logits"):
                layers.end_point("AuxLogits", _auxiliary(layers, x, num_classes))
    with layers.scope("final_layer"):
        features = layers.end_point("global_pool", tf.reduce_mean(tf.nn.relu(x), [1, 2]))
        if not num_classes:
            return Outputs(features, None)
        x = layers.dropout(features, keep=0.5)
        return Outputs(features, layers.fully_connected(x, num_classes, name="FC"))


def _cell(
    layers: Layers,
    cell: tuple,
    filters: int,
    x: Tensor,
    previous: Tensor | None,
    keep: float,
) -> Tensor:
    stride = 2 if cell is REDUCTION else 1
    second = x if previous is None else _fit(layers, previous, filters, x)
    first = layers.conv2d(tf.nn.relu(x), filters, 1, name="1x1", norm=None, gain=SUM_GAIN)
    states = [layers.batch_norm(first, name="beginning_bn"), second]
    for i, sides in enumerate(cell):
        results = []
        for side, (operation, source) in zip(("left", "right"), sides, strict=True):
            with layers.scope(f"comb_iter_{i}"), layers.scope(side):
                step = stride if source < 2 else 1  # the states made here are reduced already
                result = _operation(layers, operation, states[source], filters, step)
                if operation != "none" and keep < 1.0:
                    result = layers.drop_path(result, keep)
                results.append(result)
        states.append(results[0] + results[1])
    return tf.concat(states[LEFT_OUT[cell] :], axis=3)


def _operation(layers: Layers, name: str, x: Tensor, filters: int, stride: int) -> Tensor:
    if name == "none":
        return x
    if name == "avg_pool":
        return layers.avg_pool(x, 3, stride)
    if name == "max_pool":
        return layers.max_pool(x, 3, stride)
    kernel = name.removeprefix("separable_")
    for i in (1, 2):  # every separable convolution is applied twice
        x = layers.separable_conv2d(
            tf.nn.relu(x), filters, int(kernel[0]), name=f"{name}_{i}",
            stride=stride if i == 1 else 1,
        )  # fmt: skip
        x = layers.batch_norm(x, name=f"bn_sep_{kernel}_{i}")
    return x


def _fit(layers: Layers, previous: Tensor, filters: int, x: Tensor) -> Tensor:
    """Gives the older input `filters` channels and the size of the newer one, `x`."""
    if previous.shape[2] != x.shape[2]:
        # Half of the channels from every second pixel, half from the pixels one down and right of
        # them (zeros beyond the edge): so all of the diagonal is seen, not a quarter.
        previous = tf.nn.relu(previous)
        shifted = tf.pad(previous, [[0, 0], [0, 1], [0, 1], [0, 0]])[:, 1:, 1:, :]
        paths = []
        for path, name in ((previous, "path1_conv"), (shifted, "path2_conv")):
            # Every second pixel, as TF-Slim has it: the mean of a window of one. A slice with
            # strides is the same, but costs TensorFlow a quarter of the network's time.
            path = layers.avg_pool(path, 1, 2, "VALID")
            paths.append(layers.conv2d(path, filters // 2, 1, name=name, norm=None, gain=SUM_GAIN))
        return layers.batch_norm(tf.concat(paths, axis=3), name="final_path_bn")
    if previous.shape[3] != filters:
        previous = tf.nn.relu(previous)
        previous = layers.conv2d(previous, filters, 1, name="prev_1x1", norm=None, gain=SUM_GAIN)
        return layers.batch_norm(previous, name="prev_bn")
    return previous


def _auxiliary(layers: Layers, x: Tensor, num_classes: int) -> Tensor:
    x = layers.avg_pool(tf.nn.relu(x), 5, 3, "VALID")
    x = layers.conv2d(x, 128, 1, name="proj", norm=None)
    x = tf.nn.relu(layers.batch_norm(x, name="aux_bn0"))
    size = (int(x.shape[1]), int(x.shape[2]))
    x = layers.conv2d(x, 768, size, name="Conv", padding="VALID", norm=None)
    x = tf.nn.relu(layers.batch_norm(x, name="aux_bn1"))
    return layers.fully_connected(tf.squeeze(x, [1, 2]), num_classes, name="FC")
