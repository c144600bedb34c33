"""Bytes of image files into the pixel arrays that modules take."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hubbeam.modules.errors import ImageError
from hubbeam.modules.images import Limits, Picture, Reserve, decode
from hubbeam.modules.presets import Preset

Size = tuple[int, int]


@dataclass(frozen=True)
class DecodedBatch:
    """The decoded images of a batch, in order, without those that failed.

    Attributes:
      positions: int64 [n], position of each decoded image in the batch that came in.
      pictures: format, width and height of each, n long.
      pixels: for each input size (height, width) an array [n, height, width, 3], uint8 or
        float32 in [0, 1] as the preset says.
      errors: position in the batch that came in -> why that image gave no pixels.
    """

    positions: np.ndarray
    pictures: list[Picture]
    pixels: dict[Size, np.ndarray]
    errors: dict[int, ImageError]


def decode_batch(
    contents: Sequence[bytes | ImageError],
    preset: Preset,
    sizes: Sequence[Size],
    limits: Limits,
    reserve: Reserve,
) -> DecodedBatch:
    """Decodes a batch once and resizes it once for each distinct input size.

    Args:
      contents: bytes of image files; an error stands for a file that could not be read, and is
        passed over.
      preset: how a picture becomes the module's input.
      sizes: distinct (height, width) of the modules' inputs.
      limits: bytes and pixels that an image may have.
      reserve: keeps the decoding of large pictures within the process's memory.

    Returns:
      The decoded images and the errors of the others.
    """
    pixels = {size: np.empty((len(contents), *size, 3), preset.dtype) for size in sizes}
    positions: list[int] = []
    pictures: list[Picture] = []
    errors: dict[int, ImageError] = {}
    for position, data in enumerate(contents):
        if isinstance(data, ImageError):
            continue
        row = len(positions)
        try:
            outs = [pixels[size][row] for size in sizes]
            picture = decode(data, preset, outs, limits, reserve)
        except ImageError as error:
            errors[position] = error
            continue
        positions.append(position)
        pictures.append(picture)
    return DecodedBatch(
        np.array(positions, np.int64),
        pictures,
        {size: array[: len(positions)] for size, array in pixels.items()},
        errors,
    )
