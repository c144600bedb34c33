"""TensorFlow's bilinear resizers in numpy: the same pixels without TensorFlow."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]


class _Axis(NamedTuple):
    """For each output position: the input positions on both sides, and the weight of `upper`."""

    lower: npt.NDArray[np.intp]
    upper: npt.NDArray[np.intp]
    weight: npt.NDArray[np.float32]


@lru_cache(maxsize=1024)
def _axis(size: int, target: int, half_pixel: bool) -> _Axis:
    # In float32 and in TensorFlow's own order (image_resizer_state.h, resize_bilinear_op.cc): on
    # a side of some thousand pixels, rounding elsewhere would move the weights by 1e-4.
    scale = np.float32(size) / np.float32(target)
    place = np.arange(target, dtype=np.float32)
    half = np.float32(0.5 if half_pixel else 0)
    place = (place + half) * scale - half
    floor = np.floor(place)
    lower = np.maximum(floor, 0).astype(np.intp)
    upper = np.minimum(np.ceil(place), size - 1).astype(np.intp)
    axis = _Axis(lower, upper, place - floor)
    for table in axis:
        table.setflags(write=False)  # the cache hands them to all threads
    return axis


def resize_bilinear(image: Pixels, out: npt.NDArray[np.float32], *, half_pixel: bool) -> None:
    """Resizes as TensorFlow does, without antialiasing, and scales to [0, 1].

    Equal to ``tf.image.resize(image / 255, out.shape[:2])`` with `half_pixel`, and to
    ``tf.compat.v1.image.resize_bilinear(image / 255, out.shape[:2])`` without.

    Args:
      image: uint8 [height, width, channels], 0 to 255; at least three channels.
      out: float32 [h, w, 3], is written.
      half_pixel: whether pixel centres lie at half positions.
    """
    height, width = image.shape[:2]
    rows = _axis(height, out.shape[0], half_pixel)
    columns = _axis(width, out.shape[1], half_pixel)

    def corner(y: npt.NDArray[np.intp], x: npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
        return image[y[:, None], x[None, :], :3].astype(np.float32)

    x_weight = columns.weight[None, :, None]
    top = corner(rows.lower, columns.lower)
    right = corner(rows.lower, columns.upper)
    right -= top
    right *= x_weight
    top += right
    bottom = corner(rows.upper, columns.lower)
    right = corner(rows.upper, columns.upper)
    right -= bottom
    right *= x_weight
    bottom += right
    bottom -= top
    bottom *= rows.weight[:, None, None]
    top += bottom
    np.multiply(top, np.float32(1 / 255), out=out)
