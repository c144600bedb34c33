"""Any picture that Pillow has decoded, as 8-bit RGB."""

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageFile, TiffImagePlugin

_BITS_PER_SAMPLE = 258


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
    if mode.startswith("I;16"):
        return _deep_grey(np.asarray(file), _full_range(file), clear)
    if mode == "I":
        if file.format == "PPM":  # Pillow has scaled it to 16 bits
            return _deep_grey(np.asarray(file), 65535, clear)
        return _stretched(np.asarray(file))
    if mode == "F":
        return _stretched(np.asarray(file))
    if file.has_transparency_data:
        return _on_white(file.convert("RGBA"))
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


def _full_range(file: ImageFile.ImageFile) -> int:
    """Gives the value of white of a picture of 9 to 16 bits."""
    if isinstance(file, TiffImagePlugin.TiffImageFile):
        bits = file.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0]
        return (1 << min(max(int(bits), 1), 16)) - 1
    return 65535


def _deep_grey(values: npt.NDArray[Any], white: int, clear: object) -> Image.Image:
    table = (np.arange(65536) * 255 + white // 2) // white
    grey = table.clip(0, 255).astype(np.uint8)[np.clip(values, 0, 65535)]
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Image.fromarray(grey).convert("RGB")


def _stretched(values: npt.NDArray[Any]) -> Image.Image:
    finite = values[np.isfinite(values)].astype(np.float64)
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    span = high - low if high > low else 1.0
    known = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    scaled = (known - low) / span
    return Image.fromarray((scaled * 255 + 0.5).astype(np.uint8)).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


@lru_cache(maxsize=1)
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
