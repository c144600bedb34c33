"""What every engine is and does, and what two engines must have in common."""

from typing import Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict


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


class EngineChoice(BaseModel):
    """Which engine runs a module, with which settings, and why. JSON-able, rides in the job.

    Attributes:
      engine: name of the engine.
      version: version of its library.
      precision: type that it computes in, ``f32`` or ``bf16``.
      batch_size: images that go through the module at once.
      streams: threads that each ran batches of their own when it was measured.
      cosine_min: the worst agreement with TensorFlow over `check_pictures`, see `agreement`.
      images_per_second: what the engine alone does with that many streams on as many cores.
      cpu: the processor that it was measured on.
      pinned: whether the user named the engine.
      why: one line for a person.
      measured: images/s of the best setting of every engine that was tried.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: str
    version: str
    precision: str
    batch_size: int
    streams: int
    cosine_min: float
    images_per_second: float
    cpu: str
    pinned: bool
    why: str
    measured: dict[str, float]


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


CHECK = 1
"""Number of the set of pictures that `check_pictures` draws: another set, another number."""

COSINE_MIN = 0.99999
"""How well an engine must agree with TensorFlow on every one of them, see `agreement`."""


def check_pictures(image_size: tuple[int, int]) -> np.ndarray:
    """Draws the pictures on which engines are compared: the same on every machine.

    Drawn with integers alone: ramps, rings, a chessboard, discs, blurred and plain noise.

    Args:
      image_size: height and width.

    Returns:
      uint8 [6, height, width, 3].
    """
    height, width = image_size
    y, x = np.mgrid[:height, :width].astype(np.int64)
    v, u = y * 256 // height, x * 256 // width
    radius = (v - 128) ** 2 + (u - 128) ** 2

    # A multiplicative hash of the place (Knuth, TAOCP 3, 6.4) is noise without a generator whose
    # numbers could change between versions of NumPy.
    def noise(row: np.ndarray, column: np.ndarray, seed: int) -> np.ndarray:
        mixed = ((row * 7919 + column + seed * 104729) * 2654435761) & 0xFFFFFFFF
        mixed = ((mixed ^ (mixed >> 15)) * 2246822519) & 0xFFFFFFFF
        return (mixed >> 13) & 255

    def clouds(seed: int) -> np.ndarray:
        total = np.zeros_like(v)
        for cell in (64, 32, 16, 8):  # value noise, interpolated linearly, halved at each octave
            row, column, b, a = v // cell, u // cell, v % cell, u % cell
            top = noise(row, column, seed) * (cell - a) + noise(row, column + 1, seed) * a
            low = noise(row + 1, column, seed) * (cell - a) + noise(row + 1, column + 1, seed) * a
            total += (top * (cell - b) + low * b) // cell
        return total // 120

    disc = radius < 80**2
    pictures = [
        (u, v, 255 - (u + v) // 2),
        ((radius // 97) & 255, (radius // 41) & 255, (radius // 23) & 255),
        tuple(
            np.where(((u // 32) + (v // 32)) % 2 == 0, shade, 255 - v) for shade in (20, 90, 210)
        ),
        (
            np.where(disc, 230, v // 2),
            np.where(disc, 180 - v // 2, u),
            np.where((u // 8) % 4 == 0, 40, 120),
        ),
        tuple(clouds(seed) for seed in (1, 2, 3)),
        tuple(noise(y, x, seed) for seed in (4, 5, 6)),
    ]
    stacked = np.stack([np.stack(channels, axis=-1) for channels in pictures])
    return np.clip(stacked, 0, 255).astype(np.uint8)


def agreement(vectors: np.ndarray, reference: np.ndarray) -> float:
    """Tells how well vectors agree with those of the reference.

    Args:
      vectors: float32 [n, width].
      reference: the same of the reference.

    Returns:
      The smallest value of 2ab / (aa + bb) over the rows: the cosine where two vectors have the
      same length, less where they have not. 0 where one is not finite.
    """
    if vectors.shape != reference.shape or not len(reference):
        return 0.0
    a, b = vectors.astype(np.float64), reference.astype(np.float64)
    both = (a * a).sum(axis=1) + (b * b).sum(axis=1)
    same = np.divide(2 * (a * b).sum(axis=1), both, out=np.ones_like(both), where=both != 0)
    return float(np.nan_to_num(same, nan=0.0).min())
