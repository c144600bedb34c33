"""From the bytes of an image file to the input of a module.

`decode` is the whole interface. It keeps no state and may be called from many threads; reading
JPEG files, resizing and the larger part of the rest run outside the GIL.

JPEG is read with simplejpeg, whose pixels are those of Pillow bit by bit (both are libjpeg-turbo
with the accurate DCT and smooth chroma upsampling; the tests compare them), but which is faster
and tells of missing data that Pillow fills with grey in silence. Everything else is Pillow's.

Colour profiles (ICC) are ignored, as TensorFlow's decoders and so the modules' training did.
"""

import ctypes
import importlib
import io
import logging
import re
import struct
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import simplejpeg
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from hubbeam.modules.colour import NoRuleError, to_rgb
from hubbeam.modules.errors import ImageError
from hubbeam.modules.presets import Preset
from hubbeam.modules.resize import resize_bilinear


# Pillow's readers warn of odd metadata (EXIF, animation data) that nobody here looks at, and log
# what they raise as well. Of large pictures our own limits speak; a filter that a host program set
# for that warning comes first. The rest of Pillow keeps its voice. The filters are looked after at
# every call, for `warnings.catch_warnings` around an import, as in pytest, takes them away again.
# (To set and remove them around each call would not be safe in threads.)
def _silence_pillow() -> None:
    if _SILENT not in warnings.filters:
        warnings.filterwarnings("ignore", category=UserWarning, module=_PLUGINS)
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, append=True)


_PLUGINS = r"PIL\.\w+ImagePlugin"
_SILENT = ("ignore", None, UserWarning, re.compile(_PLUGINS), 0)
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)


def _silence_libtiff() -> None:
    """Stops Pillow's libtiff from printing to stderr what its return values say as well."""
    try:
        # A symbol is looked up in all that the library links to.
        library = ctypes.CDLL(importlib.import_module("PIL._imaging").__file__)
        for setter in (library.TIFFSetErrorHandler, library.TIFFSetWarningHandler):
            setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
            setter(None)
    except (AttributeError, OSError):
        pass  # another build of Pillow: some lines on stderr for a broken TIFF file


_silence_libtiff()

# The readers are called by class, not by `Image.open`: so no other reader can be reached, whatever
# a host program has registered. (Two of Pillow's global switches still reach formats other than
# JPEG: `ImageFile.LOAD_TRUNCATED_IMAGES` must stay off, as it is by default, or cut files are
# filled with grey; GIF and TIFF files of more than twice `Image.MAX_IMAGE_PIXELS` are refused.)
_READERS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "PNM": PpmImagePlugin.PpmImageFile,
}

# What is resized: an RGB image for the 8-bit presets, uint8 [height, width, 4] (red, green, blue,
# padding) for the others.
_Source = Image.Image | npt.NDArray[np.uint8]

_ORIENTATION_TAG = 0x0112

# A progressive JPEG of a few MB can ask for a million passes over the whole picture. Real ones
# have about ten.
_MAX_SCANS = 500


class Limits(NamedTuple):
    """What a file may ask for, checked before any pixel is decoded.

    Attributes:
      max_bytes: size of the file in bytes.
      max_pixels: width times height as the file's header says.
    """

    max_bytes: int = 100 * 2**20
    max_pixels: int = 100_000_000


_DEFAULT = Limits()


class Picture(NamedTuple):
    """What was decoded.

    Attributes:
      format: ``JPEG``, ``PNG``, ``WEBP``, ``GIF``, ``BMP``, ``TIFF`` or ``PNM``.
      width: of the whole picture in pixels, as the preset sees it (after its rotation).
      height: likewise.
    """

    format: str
    width: int
    height: int


def sniff(data: bytes) -> str | None:
    """Names the image format by content: a key of the allowed formats, or None."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    # Two letters are little proof: the sizes of BMP's headers, or PNM's white space, come with.
    if data.startswith(b"BM") and data[14:18] in _BMP_HEADERS:
        return "BMP"
    if data[:1] == b"P" and data[1:2] in b"123456" and data[2:3] in b" \t\r\n\v\f#" and data[2:3]:
        return "PNM"
    return None


_BMP_HEADERS = {struct.pack("<I", size) for size in (12, 40, 52, 56, 64, 108, 124)}


Reserve = Callable[[int], AbstractContextManager[object]]
"""Waits until so many bytes may be used, and keeps them reserved inside its context."""


def _reserve_nothing(_: int) -> AbstractContextManager[object]:
    return nullcontext()


def decode(
    data: bytes,
    preset: Preset,
    outs: Sequence[npt.NDArray[Any]],
    limits: Limits = _DEFAULT,
    reserve: Reserve = _reserve_nothing,
) -> Picture:
    """Decodes an image file (the first picture in it) into the inputs of modules.

    Args:
      data: the file's bytes.
      preset: how the picture becomes the module's input.
      outs: one array [h, w, 3] of dtype `preset.dtype` for each size that is wanted; each is
        written whole. What they hold after an error is undefined.
      limits: what the file may ask for.
      reserve: entered with an estimate of the bytes that decoding takes (measured: at most 8 a
        pixel for JPEG, 16 for the others), so that many large pictures need not be decoded at once.

    Returns:
      What was found in the file.

    Raises:
      ImageError: for whatever is wrong with the file, with one of the reasons empty, too_large,
        too_many_pixels, unsupported_format, truncated or corrupt.
      ValueError: an array of `outs` has another shape or dtype.
    """
    for out in outs:
        if out.ndim != 3 or out.shape[2] != 3 or out.dtype != preset.dtype:
            raise ValueError(f"want [h, w, 3] {preset.dtype}, not {out.shape} {out.dtype}")
    if not data:
        raise ImageError("empty", "the file has no bytes")
    if len(data) > limits.max_bytes:
        raise ImageError("too_large", f"{len(data)} bytes, more than {limits.max_bytes}")
    kind = sniff(data)
    if kind is None:
        raise ImageError("unsupported_format", f"starts with {data[:8]!r}")
    _silence_pillow()
    file = _open(data, kind, limits)
    with reserve((8 if kind == "JPEG" else 16) * file.width * file.height):
        if kind == "JPEG":
            return _decode_jpeg(data, file, preset, outs)
        return _decode_other(data, file, kind, preset, outs)


def _decode_jpeg(
    data: bytes, file: ImageFile.ImageFile, preset: Preset, outs: Sequence[npt.NDArray[Any]]
) -> Picture:
    _check_scans(data, file)
    width, height = file.size
    orientation = _orientation(file) if preset.exif_orientation else 1
    box = _central_box(width, height, preset.central_fraction)

    # One decode for each scale that is needed: mostly one for all outputs.
    by_scale: dict[int, list[npt.NDArray[Any]]] = {}
    for out in outs:
        scale = 1
        if preset.jpeg_scaling is not None:
            rows, columns, _ = _stored(out, orientation).shape
            size = (box[3] - box[1], box[2] - box[0])
            scale = preset.jpeg_scaling.denominator(size, (rows, columns))
        by_scale.setdefault(scale, []).append(out)
    for scale, group in by_scale.items():
        source = _read_jpeg(data, file, scale, preset)
        for out in group:
            _resize(source, box, scale, preset, _stored(out, orientation))
    return _picture("JPEG", width, height, orientation)


def _check_scans(data: bytes, file: ImageFile.ImageFile) -> None:
    """Refuses files that ask for absurdly many passes over the picture."""
    assert isinstance(file, JpegImagePlugin.JpegImageFile)
    if not file.info.get("progressive"):
        # The reader stands behind the head of the first scan, which says how many components the
        # scan has: all of them in nearly every file, and then there is no other scan.
        assert file.fp is not None
        head = file.fp.tell() - 2 * file.layers - 4
        if data[head : head + 1] == bytes([file.layers]):
            return
    if data.count(b"\xff\xda") > _MAX_SCANS:
        raise ImageError("corrupt", f"JPEG: more than {_MAX_SCANS} scans")


def _read_jpeg(data: bytes, file: ImageFile.ImageFile, scale: int, preset: Preset) -> _Source:
    """Decodes at 1 / `scale` of the size, sides rounded up."""
    width, height = (-(-side // scale) for side in file.size)
    # Four bytes a pixel is how Pillow and our own resizer keep them: neither makes a copy.
    space = "CMYK" if file.mode == "CMYK" else "RGBX"

    def read(data: bytes) -> npt.NDArray[np.uint8]:
        # Room for what the checked header says, and not for what the decoder may find elsewhere.
        room = np.empty(height * width * 4, np.uint8)
        pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data, space, min_height=height, min_width=width, strict=True, buffer=room
        )
        return pixels

    try:
        try:
            pixels = read(data)
        except ValueError as error:
            # Strict means that libjpeg's warnings are errors. Some writers leave out the end
            # marker: with it put there, a whole picture gives no warning any more. (Of a
            # progressive file nobody knows then whether further scans are missing.)
            text = str(error).lower()
            if "premature end of jpeg file" in text and not file.info.get("progressive"):
                pixels = read(data + b"\xff\xd9")
            elif "premature end" in text:
                raise
            else:  # stray bytes and the like, which Pillow, browsers and TensorFlow pass over
                again = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
                if scale > 1:
                    again.draft(None, (again.width // scale, again.height // scale))
                again.load()
                return _source(to_rgb(again), preset)
    except Exception as error:
        raise _image_error(error, "JPEG") from error
    if pixels.shape[:2] != (height, width):
        raise ImageError("corrupt", "JPEG: the headers disagree about the size")
    if space == "CMYK":
        # Adobe's convention, which CMYK files in the wild follow: 255 is no ink.
        image = Image.frombuffer("CMYK", (width, height), pixels, "raw", "CMYK;I", 0, 1)
        return _source(image.convert("RGB"), preset)
    if preset.dtype != np.uint8:
        return pixels
    words = pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), 4)
    return Image.fromarrow(words, "RGB", (width, height))


def _decode_other(
    data: bytes,
    file: ImageFile.ImageFile,
    kind: str,
    preset: Preset,
    outs: Sequence[npt.NDArray[Any]],
) -> Picture:
    try:
        file.load()
        # Of TIFF, the orientation is a part, and Pillow's reader has applied it; asking again
        # gives 1. That of PNG may stand behind the pixels.
        orientation = _orientation(file) if preset.exif_orientation else 1
        width, height = file.size
        source = _source(to_rgb(file), preset)
    except NoRuleError as error:
        raise ImageError("unsupported_format", f"{kind}: {error}") from error
    except Exception as error:
        raise _image_error(error, kind, data) from error
    box = _central_box(width, height, preset.central_fraction)
    for out in outs:
        _resize(source, box, 1, preset, _stored(out, orientation))
    return _picture(kind, width, height, orientation)


def _open(data: bytes, kind: str, limits: Limits) -> ImageFile.ImageFile:
    """Reads the headers and checks the limits."""
    if kind == "WEBP":  # the reader makes room for the whole picture when it is opened
        _check_size(*_webp_size(data), limits)
    stream = io.BytesIO(data)
    try:
        file = _READERS[kind](stream)
    except Exception as error:
        _refuse_variant(kind, error)
        # Pillow turns what its readers stumble over into a SyntaxError.
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise _image_error(cause, kind, data, stream) from error
    _check_size(*file.size, limits)
    if kind == "TIFF":
        _check_tiff(file, data, limits)
    return file


def _refuse_variant(kind: str, error: Exception) -> None:
    """Raises `unsupported_format` where Pillow understood the headers, but cannot decode that."""
    text = str(error)
    if kind == "JPEG" and text.startswith("cannot handle "):
        what = text.removeprefix("cannot handle ")  # 12 bits
    elif kind == "TIFF" and text in ("unknown pixel mode", "unknown data organization"):
        what = text
    elif kind == "TIFF" and isinstance(error.__cause__, KeyError):
        what = f"compression {error.__cause__}"
    elif kind == "BMP" and text.startswith("Unsupported BMP "):
        what = text.removeprefix("Unsupported BMP ")
    else:
        return
    raise ImageError("unsupported_format", f"{kind}: no decoder for {what}") from error


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width < 1 or height < 1:
        raise ImageError("corrupt", f"{width} x {height} pixels")
    if width * height > limits.max_pixels:
        raise ImageError(
            "too_many_pixels", f"{width} x {height} pixels, more than {limits.max_pixels}"
        )


def _webp_size(data: bytes) -> tuple[int, int]:
    """Reads width and height from the first chunk (developers.google.com, WebP container)."""
    chunk = data[12:16]
    if len(data) < 30:
        raise ImageError("truncated", "WEBP: the header ends early")
    if chunk == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        bits = int.from_bytes(data[26:30], "little")
        return bits & 0x3FFF, bits >> 16 & 0x3FFF
    raise ImageError("corrupt", f"WEBP: unknown first chunk {chunk!r}")


def _check_tiff(file: ImageFile.ImageFile, data: bytes, limits: Limits) -> None:
    """Refuses TIFF files whose pixels Pillow would misread or look for beyond the end.

    Tiles count as pictures: room is made for a whole one, however little of it is used.
    """
    assert isinstance(file, TiffImagePlugin.TiffImageFile)
    tags = file.tag_v2
    try:
        if 322 in tags and 323 in tags:  # TileWidth, TileLength
            _check_size(int(tags[322]), int(tags[323]), limits)
        if tags.get(262) == 6 and file.tile and file.tile[0][0] == "raw":  # Pillow reads it as RGB
            raise ImageError("unsupported_format", "TIFF: no decoder for uncompressed YCbCr")
        for offsets, counts in ((273, 279), (324, 325)):  # of strips, of tiles
            pairs = zip(tags.get(offsets, ()), tags.get(counts, ()), strict=False)
            if any(offset + count > len(data) for offset, count in pairs):
                raise ImageError("truncated", "TIFF: pixels lie beyond the end of the file")
    except Exception as error:  # tags are parsed when they are asked for
        raise _image_error(error, "TIFF", data) from error


def _tiff_directory_end(data: bytes) -> int:
    """Tells where the first image file directory ends (TIFF 6.0, and BigTIFF's wider fields)."""
    order: Literal["little", "big"] = "little" if data.startswith(b"II") else "big"
    big = b"+" in data[2:4]
    start = int.from_bytes(data[8:16] if big else data[4:8], order)
    count = int.from_bytes(data[start : start + (8 if big else 2)], order)
    return start + (8 + 20 * count + 8 if big else 2 + 12 * count + 4)


def _orientation(file: ImageFile.ImageFile) -> int:
    """Gives the EXIF orientation, 1 to 8; 1 where it is missing or broken."""
    try:
        value = file.getexif().get(_ORIENTATION_TAG)
    except Exception:  # broken metadata do not make a picture unreadable
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _stored(out: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """Gives the view of `out` in which a picture lies as it is stored in its file.

    EXIF 2.32, tag 274: which visual sides the 0th row and the 0th column are.
    """
    if orientation >= 5:
        out = out.transpose(1, 0, 2)
    rows = -1 if orientation in (3, 4, 6, 7) else 1
    columns = -1 if orientation in (2, 3, 7, 8) else 1
    return out[::rows, ::columns]


def _picture(kind: str, width: int, height: int, orientation: int) -> Picture:
    return Picture(kind, height, width) if orientation >= 5 else Picture(kind, width, height)


def _central_box(width: int, height: int, fraction: float) -> tuple[int, int, int, int]:
    """Gives left, top, right, bottom with the arithmetic of `tf.image.central_crop`."""
    left = int((width - width * fraction) / 2)
    top = int((height - height * fraction) / 2)
    return left, top, width - left, height - top


def _source(image: Image.Image, preset: Preset) -> _Source:
    if preset.dtype == np.uint8:
        return image
    pixels = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint8)
    return pixels.reshape(image.height, image.width, 4)


def _resize(
    source: _Source,
    box: tuple[int, int, int, int],
    scale: int,
    preset: Preset,
    out: npt.NDArray[Any],
) -> None:
    """Resizes the `box` (in unscaled coordinates) of a picture decoded at 1 / `scale`."""
    if isinstance(source, np.ndarray):
        resize_bilinear(source, box, out, half_pixel=preset.resize == "bilinear")
        return
    # A side that is no multiple of `scale` fills its last pixel only in part.
    left, top, right, bottom = (side / scale for side in box)
    size = (out.shape[1], out.shape[0])
    small = source.resize(size, Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    out[...] = np.asarray(small)


def _image_error(
    error: Exception, kind: str, data: bytes = b"", stream: io.BytesIO | None = None
) -> ImageError:
    """Finds the reason for a reader's failure (at the place in `stream`, if that is known)."""
    if isinstance(error, ImageError):
        return error
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError):
        return ImageError("corrupt", f"{kind}: the reader asked for too much memory")
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return ImageError("too_many_pixels", f"{kind}: {text}")
    early = isinstance(error, EOFError)
    if kind == "WEBP":  # read in one piece; RIFF says how long it should be
        early = int.from_bytes(data[4:8], "little") + 8 > len(data)
    elif kind == "TIFF":
        early |= _tiff_directory_end(data) > len(data)
    elif stream is not None and stream.tell() >= len(data):
        early = isinstance(error, (EOFError, IndexError, OSError, struct.error))
    if early or "truncated" in text.lower() or "premature end" in text.lower():
        return ImageError("truncated", f"{kind}: {text}")
    return ImageError("corrupt", f"{kind}: {text}")
