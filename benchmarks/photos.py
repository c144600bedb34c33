"""Photographs for the benchmark, made from a fixed seed: no data to fetch, no licence to mind.

A JPEG codec's work depends on edges, texture and noise. Each picture is a "dead leaves" scene
(discs of all sizes in front of each other, Lee, Mumford and Huang 2001, whose edges and scales are
those of natural scenes), shaded and textured by noise with the 1/f amplitude spectrum of
photographs (Field 1987), blurred by a lens and covered with the noise of a sensor. Files are as
large as those of cameras at the same size and quality.
"""

import io
import itertools
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

VERSION = 1
"""Raised whenever the pictures change: results of different versions are not compared."""

SEED = 20180807
_ORIENTATION = 0x0112


class Kind(NamedTuple):
    """How one file is made.

    Attributes:
      width: of the stored picture, in pixels.
      height: likewise.
      format: Pillow's name of the file format.
      progressive: JPEG in several passes.
      orientation: EXIF orientation, 1 for none.
    """

    width: int
    height: int
    format: str = "JPEG"
    progressive: bool = False
    orientation: int = 1


SMALL = Kind(500, 375)
LARGE = Kind(4000, 3000)
TINY = Kind(256, 192)

# Of twenty files of a mixed collection: what was made for the web, what a telephone took (held
# upright: EXIF orientation 6), pictures that an editor saved progressively, PNG and WebP.
MIX = (
    *[SMALL] * 6,
    *[Kind(375, 500)] * 2,
    *[Kind(1024, 768)] * 3,
    Kind(1024, 768, progressive=True),
    *[Kind(1600, 1200)] * 2,
    Kind(1600, 1200, orientation=6),
    Kind(800, 800),
    LARGE,
    Kind(4000, 3000, orientation=6),
    Kind(640, 480, "PNG"),
    Kind(800, 600, "WEBP"),
)

SETS: dict[str, tuple[Kind, ...]] = {
    "500x375": (SMALL,),
    "4000x3000": (LARGE,),
    "mix": MIX,
    "256x192": (TINY,),
}
"""Name of a set of photographs -> the kinds that its files have in turn."""

_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def make_photos(name: str, count: int, cache: Path) -> list[Path]:
    """Makes the first `count` photographs of a set, those that are not there yet, on all cores.

    Args:
      name: one of `SETS`.
      count: how many.
      cache: folder that keeps them.

    Returns:
      Their paths, all different pictures.
    """
    folder = cache / f"photos-{VERSION}" / name
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:06d}.{_EXTENSIONS[_kind(name, i).format]}" for i in range(count)]
    missing = [(name, i, path) for i, path in enumerate(paths) if not path.exists()]
    if missing:
        # Fresh processes: a fork of one that has threads may hang.
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            list(pool.map(_write, *zip(*missing, strict=True), chunksize=4))
    return paths


def lay_out(photos: Sequence[Path], count: int, folder: Path) -> Path:
    """Fills a folder with `count` images under names of their own, as hard links to `photos`.

    Args:
      photos: the photographs, taken in turn.
      count: names wanted; more than photographs means that pictures repeat.
      folder: removed and made anew, unless it already has `count` files.

    Returns:
      The folder.
    """
    if folder.exists() and sum(1 for _ in folder.iterdir()) == count:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, photo in enumerate(itertools.islice(itertools.cycle(photos), count)):
        name = folder / f"{number:07d}{photo.suffix}"
        try:
            os.link(photo, name)
        except OSError:  # a file system without hard links
            shutil.copyfile(photo, name)
    return folder


def _kind(name: str, number: int) -> Kind:
    kinds = SETS[name]
    return kinds[number % len(kinds)]


def _write(name: str, number: int, path: Path) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(encode(_kind(name, number), [SEED, len(name), *name.encode(), number]))
    temporary.replace(path)


def encode(kind: Kind, seed: Sequence[int]) -> bytes:
    """Makes one photograph.

    Args:
      kind: its size and format.
      seed: numbers that name the picture.

    Returns:
      The file.
    """
    rng = np.random.default_rng(seed)
    image = scene(kind.width, kind.height, rng)
    data = io.BytesIO()
    if kind.format == "JPEG":
        exif = Image.Exif()
        if kind.orientation != 1:
            exif[_ORIENTATION] = kind.orientation
        image.save(
            data,
            "JPEG",
            quality=int(rng.integers(85, 91)),
            subsampling="4:2:0",
            progressive=kind.progressive,
            exif=exif,
        )
    else:
        image.save(data, kind.format)
    return data.getvalue()


def scene(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Draws a picture, RGB.

    Args:
      width: in pixels.
      height: in pixels.
      rng: makes all decisions.
    """
    ground = Image.new("RGB", (width, height), _colour(rng))
    draw = ImageDraw.Draw(ground)
    side = min(width, height)
    # Radii with density 1 / r^3, which looks the same at every scale; the largest behind.
    smallest, largest = side / 60, side / 2
    u = rng.random(int(rng.integers(120, 500)))
    radii = np.sort(1 / np.sqrt(u / smallest**2 + (1 - u) / largest**2))[::-1]
    for radius in radii:
        x, y = rng.random() * width, rng.random() * height
        tall = radius * rng.uniform(0.4, 1.6)
        box = (x - radius, y - tall, x + radius, y + tall)
        draw.ellipse(box, fill=_colour(rng)) if rng.random() < 0.6 else draw.rectangle(
            box, fill=_colour(rng)
        )
    pixels = np.array(ground, np.float32)
    light = _spectrum(width, height, rng, coarsest=2, octaves=3)
    # A texture fills some places and leaves others smooth.
    octaves = max(3, int(np.log2(side)) - 3)
    texture = _spectrum(width, height, rng, coarsest=8, octaves=octaves)
    texture *= np.clip(_spectrum(width, height, rng, coarsest=3, octaves=2) + 0.3, 0, 1.2)
    shade = 1 + 0.18 * light + rng.uniform(0.15, 0.5) * texture
    pixels *= shade[..., None]
    image = Image.fromarray(np.clip(pixels, 0, 255, out=pixels).astype(np.uint8))
    # Large sensors are softer, pixel by pixel, than pictures that were scaled down for the web.
    large = side > 1500
    image = image.filter(ImageFilter.GaussianBlur(0.9 if large else 0.45))
    # One tile of grain, repeated: a codec does not notice, and twelve million numbers take long.
    shape = (min(height, 1024), min(width, 1024))
    tile = rng.standard_normal((*shape, 3), dtype=np.float32)
    tile += rng.standard_normal((*shape, 1), dtype=np.float32)
    tile *= rng.uniform(2, 4) if large else rng.uniform(0.5, 6)
    repeats = (-(-height // shape[0]), -(-width // shape[1]), 1)
    pixels = np.asarray(image) + np.tile(tile, repeats)[:height, :width]
    return Image.fromarray(np.clip(pixels, 0, 255, out=pixels).astype(np.uint8))


def _colour(rng: np.random.Generator) -> tuple[int, ...]:
    """A muted colour, as most things have."""
    grey = rng.uniform(25, 225)
    return tuple(int(v) for v in np.clip(grey + rng.normal(0, 28, 3), 0, 255))


def _spectrum(
    width: int, height: int, rng: np.random.Generator, *, coarsest: int, octaves: int
) -> np.ndarray:
    """Noise with an amplitude spectrum of 1/f: equal energy in every octave.

    Returns:
      float32 [height, width], mean 0 and standard deviation 1, about.
    """
    total = np.zeros((1, 1), np.float32)
    for octave in range(octaves):
        columns = min(width, coarsest * 2**octave)
        rows = max(1, columns * height // width)
        total = _resized(total, columns, rows)
        total += rng.standard_normal((rows, columns), dtype=np.float32)
    return _resized(total, width, height) * np.float32(1.4 / np.sqrt(octaves))


def _resized(values: np.ndarray, width: int, height: int) -> np.ndarray:
    image = Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)
    return np.array(image)
