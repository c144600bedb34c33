"""What every engine is and does, and what two engines must have in common."""

from typing import Protocol

import numpy as np


class Engine(Protocol):
    """Runs one signature of one module. Made once per process and shared by its threads.

    Attributes:
      name: `tensorflow`, `openvino` or `openvino-bf16`.
      version: version of the library that computes.
      streams: how many threads should call `run` at once for the best throughput.
      batch_size: images in a call that suit it best; `run` takes any number.
    """

    name: str
    version: str
    streams: int
    batch_size: int

    def run(self, pixels: np.ndarray) -> np.ndarray:
        """Gives the vectors of a batch; may be called by any number of threads at once.

        Args:
          pixels: [n, height, width, 3], uint8 in 0..255 (means value / 255) or float32 in [0, 1].

        Returns:
          float32 [n, width of the vector].

        Raises:
          ValueError: other shape or type.
        """
        ...


def check_pixels(pixels: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Returns `pixels` in C order, see `Engine.run`.

    Raises:
      ValueError: they do not have the module's shape, or are neither uint8 nor float32.
    """
    if pixels.dtype not in (np.uint8, np.float32):
        raise ValueError(f"pixels must be uint8 or float32, not {pixels.dtype}")
    if pixels.ndim != 4 or pixels.shape[1:] != (*image_size, 3):
        wanted = f"[n, {image_size[0]}, {image_size[1]}, 3]"
        raise ValueError(f"pixels must have the shape {wanted}, not {list(pixels.shape)}")
    return np.ascontiguousarray(pixels)
