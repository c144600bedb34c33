"""Any picture that Pillow has decoded, as 8-bit RGB."""

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageFile, TiffImagePlugin

# TIFF 6.0's tags.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339

_BLOCK = 1 << 20


class NoRuleError(ValueError):
    """Pixels of a kind for which there is no rule."""


def to_rgb(file: ImageFile.ImageFile) -> Image.Image:
    """Gives 8-bit RGB.

    - Transparency (alpha, or a transparent colour) is composited on white.
    - Grey of 9 to 16 bits is scaled by its full range: white stays white, nothing is clipped.
    - Float grey is taken as it is where all of it lies in [0, 1]; other float grey, and grey of
      signed 16 or of 32 bits, whose range says nothing, is stretched from its minimum (black) to
      its maximum (white). NaN is black, infinities are the ends.
    - CMYK is converted as Pillow does it, L*a*b* (D50) with LittleCMS.

    Args:
      file: a loaded picture; its `info` and tags are looked at.

    Raises:
      NoRuleError: there is no rule for this mode.
    """
    mode, clear = file.mode, file.info.get("transparency")
    if mode.startswith("I") or mode == "F":
        values = np.asarray(file)
        tags = file.tag_v2 if isinstance(file, TiffImagePlugin.TiffImageFile) else {}
        if mode.startswith("I;16"):
            bits = min(max(int(tags.get(_BITS_PER_SAMPLE, (16,))[0]), 1), 16)
            grey = _scaled(values, (1 << bits) - 1, clear)
        elif mode == "I" and not tags:  # PNM, which Pillow has scaled to 16 bits
            grey = _scaled(values, 65535, clear)
        else:
            unsigned = tags.get(_SAMPLE_FORMAT, (1,))[0] == 1
            if mode == "I" and unsigned and tags.get(_BITS_PER_SAMPLE) == (32,):
                values = values.view(np.uint32)  # Pillow's own integers have a sign
            grey = _stretched(values)
        if tags.get(_PHOTOMETRIC) == 0:  # white is zero; Pillow heeds it up to 8 bits only
            grey = 255 - grey
        return Image.fromarray(grey).convert("RGB")
    if file.has_transparency_data:
        return _on_white(file if mode == "RGBA" else file.convert("RGBA"))
    if mode == "LAB":
        rgb = ImageCms.applyTransform(file, _lab_to_srgb())
        assert rgb is not None
        return rgb
    if mode == "RGB":
        return file
    try:
        return file.convert("RGB")
    except ValueError as error:
        raise NoRuleError(f"pixels of mode {mode}") from error


def _scaled(values: npt.NDArray[Any], white: int, clear: object) -> npt.NDArray[np.uint8]:
    table = ((np.arange(65536) * 255 + white // 2) // white).clip(0, 255).astype(np.uint8)
    grey = table.take(values, mode="clip")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return grey


def _stretched(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    low, high = 0.0, 1.0
    known = np.isfinite(values)
    if known.any():
        some = values if known.all() else values[known]  # a copy only where it must be
        low, high = float(some.min()), float(some.max())
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    span = high - low or 1.0
    grey = np.empty(values.shape, np.uint8)
    flat, flat_grey = values.reshape(-1), grey.reshape(-1)
    for start in range(0, flat.size, _BLOCK):  # in double precision, but never the whole picture
        part = flat[start : start + _BLOCK].astype(np.float64)
        part = np.nan_to_num(part, copy=False, nan=low, posinf=high, neginf=low)
        part -= low
        part *= 255 / span
        part += 0.5
        flat_grey[start : start + _BLOCK] = part
    return grey


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


@lru_cache(maxsize=1)
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
