"""TensorFlow's bilinear resizers in numpy: the same pixels without TensorFlow."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# Output rows at a time: what is computed on the way then stays in the cache, and numpy need not
# fetch fresh pages from the system for each picture, which takes four times as long as the rest.
_ROWS = 32

_TO_UNIT = np.float32(1 / 255)


class _Axis(NamedTuple):
    """Where each output position lies on an input side.

    Attributes:
      places: intp [2 * target], the input positions before it, then those after it.
      weight: float32 [target], the share of the position after it.
    """

    places: npt.NDArray[np.intp]
    weight: npt.NDArray[np.float32]


@lru_cache(maxsize=1024)
def _axis(size: int, target: int, half_pixel: bool) -> _Axis:
    # In float32 and in TensorFlow's own order (image_resizer_state.h, resize_bilinear_op.cc): on
    # a side of some thousand pixels, rounding elsewhere would move the weights by 1e-4.
    scale = np.float32(size) / np.float32(target)
    half = np.float32(0.5 if half_pixel else 0)
    place = (np.arange(target, dtype=np.float32) + half) * scale - half
    floor = np.floor(place)
    lower = np.maximum(floor, 0).astype(np.intp)
    upper = np.minimum(np.ceil(place), size - 1).astype(np.intp)
    axis = _Axis(np.concatenate([lower, upper]), place - floor)
    for table in axis:
        table.setflags(write=False)  # the cache hands them to all threads
    return axis


def resize_bilinear(
    image: npt.NDArray[np.uint8],
    box: tuple[int, int, int, int],
    out: npt.NDArray[np.float32],
    *,
    half_pixel: bool,
) -> None:
    """Resizes as TensorFlow does, without antialiasing, and scales to [0, 1].

    With `crop` for the part of ``image / 255`` in the box, equal to
    ``tf.image.resize(crop, out.shape[:2])`` with `half_pixel`, and to
    ``tf.compat.v1.image.resize_bilinear(crop, out.shape[:2])`` without.

    Args:
      image: uint8 [height, width, 4], contiguous: red, green, blue (0 to 255) and padding, which
        makes a pixel one machine word.
      box: left, top, right, bottom of the part that is resized, in pixels.
      out: float32 [h, w, 3], is written.
      half_pixel: whether pixel centres lie at half positions.
    """
    left, top, right, bottom = box
    height, width = out.shape[:2]
    y = _axis(bottom - top, height, half_pixel)
    x = _axis(right - left, width, half_pixel)
    words = image.view(np.uint32)[:, :, 0]
    x_places, x_weight = x.places + left, np.repeat(x.weight, 4)
    for start in range(0, height, _ROWS):
        part = slice(start, min(start + _ROWS, height))
        count = part.stop - part.start
        y_places = np.concatenate([y.places[:height][part], y.places[height:][part]]) + top
        columns = words.take(y_places, axis=0).take(x_places, axis=1).view(np.uint8)
        before = columns[:, : 4 * width].astype(np.float32)
        after = columns[:, 4 * width :] - before
        after *= x_weight
        before += after
        above, below = before[:count], before[count:]
        below -= above
        below *= y.weight[part, None]
        above += below
        pixels = above.reshape(count, width, 4)
        for channel in range(3):
            np.multiply(pixels[:, :, channel], _TO_UNIT, out=out[part, :, channel])
