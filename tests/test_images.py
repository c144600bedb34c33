import io
import random
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps

from hubbeam.modules.errors import ImageError
from hubbeam.modules.images import Limits, Picture, decode, sniff
from hubbeam.modules.presets import load_preset

DEFAULT = Limits()
PHOTO, HUB, SLIM = (load_preset(name) for name in ("photo", "hub", "slim_eval"))

# What becomes of each file of ../shared/images/nasty.
NASTY = {
    "12bit.cropped.tif": Picture("TIFF", 100, 100),
    "16bit.cropped.tif": Picture("TIFF", 64, 64),
    "1_trns.png": Picture("PNG", 64, 64),
    "LICENSE.Pillow": "unsupported_format",
    "LICENSE.libjpeg-turbo": "unsupported_format",
    "broken.png": "corrupt",
    "broken_data_stream.png": "corrupt",
    "broken_exif_dpi.jpg": Picture("JPEG", 100, 100),
    "combined_larger_than_size.psd": "unsupported_format",
    "crash-0e16d3bfb83be87356d026d66919deaefca44dac.tif": "truncated",
    "crash-db8bfa78b19721225425530c5946217720d7df4e.sgi": "unsupported_format",
    "decompression_bomb.gif": "too_many_pixels",
    "decompression_bomb.ico": "unsupported_format",
    "dispose_bgnd_transparency.gif": Picture("GIF", 38, 32),
    "duplicate_frame.gif": Picture("GIF", 10, 10),
    "empty_gps_ifd.jpg": Picture("JPEG", 10, 10),
    "exif_typeerror.jpg": Picture("JPEG", 800, 531),
    "flower2.jpg": Picture("JPEG", 300, 225),
    "frozenpond.mpo": Picture("JPEG", 640, 480),
    "hopper-XYZ.png": Picture("PNG", 128, 128),
    "hopper.bmp": Picture("BMP", 128, 128),
    "hopper.gif": Picture("GIF", 128, 128),
    "hopper.jpg": Picture("JPEG", 128, 128),
    "hopper.pcd": "unsupported_format",
    "hopper.png": Picture("PNG", 128, 128),
    "hopper.ppm": Picture("PNM", 128, 128),
    "hopper.psd": "unsupported_format",
    "hopper.tif": Picture("TIFF", 128, 128),
    "hopper.webp": Picture("WEBP", 128, 128),
    "hopper_bad_exif.jpg": Picture("JPEG", 500, 500),
    "hopper_gray.jpg": Picture("JPEG", 128, 128),
    "html_page.jpg": "unsupported_format",
    "i_trns.png": Picture("PNG", 64, 64),
    "icc_profile_big.jpg": Picture("JPEG", 425, 250),
    "iss634.webp": Picture("WEBP", 245, 245),
    "mode_16bit.png": Picture("PNG", 128, 64),
    "monkey12.jpg": "unsupported_format",
    "no_palette.gif": Picture("GIF", 1, 1),
    "no_rows_per_strip.tif": Picture("TIFF", 950, 975),
    "oom-225817ca0f8c663be7ab4b9e717b02c661e66834.tif": "truncated",
    "p_trns_single.png": Picture("PNG", 64, 64),
    "pil123p.png": Picture("PNG", 162, 150),
    "pil123rgba.png": Picture("PNG", 162, 150),
    "pil_sample_cmyk.jpg": Picture("JPEG", 100, 100),
    "png_decompression_dos.png": "corrupt",
    "rgb32bf-rgba.bmp": Picture("BMP", 127, 64),
    "testimgari.jpg": Picture("JPEG", 227, 149),
    "timeout-6646305047838720": "truncated",
    "transparent.png": Picture("PNG", 200, 150),
    "truncated_image.png": "truncated",
    "truncated_jpeg.jpg": "truncated",
    "zero_bytes.jpg": "empty",
    "zero_width.gif": "corrupt",
}


def outcome(data, preset=PHOTO, limits=DEFAULT, size=(64, 64)):
    """The picture or the reject reason."""
    try:
        return decode(data, preset, [np.empty((*size, 3), preset.dtype)], limits)
    except ImageError as error:
        assert error.message
        return error.reason


def pixels(data, size=None):
    """The decoded picture, uint8: under `hub` at its own size nothing is resized."""
    if size is None:
        found = outcome(data, HUB)
        assert isinstance(found, Picture), found
        size = (found.height, found.width)
    out = np.empty((*size, 3), np.float32)
    decode(data, HUB, [out])
    whole = np.rint(out * 255)
    np.testing.assert_allclose(out * 255, whole, atol=1e-3)
    return whole.astype(np.uint8)


def photo(data, size=(224, 224), preset=PHOTO):
    out = np.empty((*size, 3), np.uint8)
    decode(data, preset, [out])
    return out


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def scene(width=211, height=147):
    """A picture with edges, ramps and noise, RGB."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(7).integers(0, 60, (height, width))
    red = 255 * x // width
    green = np.where((x // 9 + y // 7) % 2, 220, 30)
    blue = (255 * y // height + noise) % 256
    return Image.fromarray(np.dstack([red, green, blue]).astype(np.uint8))


# --- which files


@pytest.mark.parametrize("preset", [PHOTO, HUB, SLIM], ids=lambda p: p.name)
def test_every_nasty_file(shared, preset):
    files = sorted((shared / "images" / "nasty").iterdir())
    assert {f.name: outcome(f.read_bytes(), preset) for f in files} == NASTY


def test_nasty_files_cost_little_memory_and_say_nothing(shared, peak_code):
    # Under an address space of 4 GB a reader that trusts the headers dies.
    script = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from pathlib import Path
import numpy as np
from hubbeam.modules.images import decode
from hubbeam.modules.errors import ImageError
from hubbeam.modules.presets import load_preset, preset_names
for name in preset_names():
    preset = load_preset(name)
    for file in sorted(Path(sys.argv[1]).iterdir()):
        try:
            decode(file.read_bytes(), preset, [np.empty((224, 224, 3), preset.dtype)])
        except ImageError:
            pass
"""
    done = subprocess.run(
        [sys.executable, "-c", script + peak_code, str(shared / "images" / "nasty")],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    (peak,) = done.stderr.splitlines()
    assert int(peak) < 1 << 30


def test_importing_reads_no_tensorflow():
    script = "import sys, hubbeam.modules.images as i; print('tensorflow' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_formats_are_judged_by_content(kind):
    assert outcome(saved(scene(), kind)) == Picture({"PPM": "PNM"}.get(kind, kind), 211, 147)


@pytest.mark.parametrize("kind", ["ICO", "TGA", "PCX", "SGI", "JPEG2000", "DDS", "IM", "PDF"])
def test_other_formats_are_refused(kind):
    assert outcome(saved(scene(64, 64), kind)) == "unsupported_format"


@pytest.mark.parametrize(
    "data",
    [b"BMW is a car", b"P7\nWIDTH 1\n", b"Pf 1 1", b"P", b"\xff\xd8", b"RIFF0000WAVE", b"\0"],
)
def test_short_likeness_is_not_enough(data):
    assert sniff(data) is None
    assert outcome(data) == "unsupported_format"


def test_first_frame_of_animations():
    red, blue = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (20, 10), "blue")
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        options = {} if kind != "WEBP" else {"lossless": True}
        data = saved(red, kind, save_all=True, append_images=[blue], **options)
        assert (pixels(data) == (255, 0, 0)).all(), kind
    data = saved(red, "MPO", save_all=True, append_images=[blue])
    assert abs(pixels(data).astype(int) - (255, 0, 0)).max() < 3


def whole_files():
    image = scene()
    return {
        "JPEG": saved(image, "JPEG", quality=90),
        "progressive JPEG": saved(image, "JPEG", progressive=True),
        "CMYK JPEG": saved(image.convert("CMYK"), "JPEG"),
        "PNG": saved(image, "PNG"),
        "WEBP": saved(image, "WEBP"),
        "lossless WEBP": saved(image, "WEBP", lossless=True),
        "GIF": saved(image, "GIF"),
        "BMP": saved(image, "BMP"),
        "TIFF": saved(image, "TIFF"),
        "LZW TIFF": saved(image, "TIFF", compression="tiff_lzw"),
        "deflated TIFF": saved(image, "TIFF", compression="tiff_adobe_deflate"),
        "PPM": saved(image, "PPM"),
    }


@pytest.mark.parametrize("kind", whole_files())
def test_cut_files_are_truncated(kind):
    data = whole_files()[kind]
    assert isinstance(outcome(data), Picture)
    for part in (0.4, 0.9):
        cut = data[: int(len(data) * part)]
        assert outcome(cut) == "truncated", part
        if "JPEG" in kind:  # libjpeg would fill the rest with grey
            assert outcome(cut + b"\xff\xd9") == "truncated", part


def test_missing_end_marker_costs_no_image():
    data = saved(scene(), "JPEG")
    assert data.endswith(b"\xff\xd9")
    np.testing.assert_array_equal(pixels(data[:-2]), pixels(data))


def test_harmless_oddities_of_jpeg_cost_no_image():
    data = saved(scene(2000, 1500), "JPEG")
    version = data.index(b"JFIF\0") + 5
    for odd in (
        data[:-2] + b"\0" * 20 + b"\xff\xd9",  # stray bytes before the end marker
        data + b"appended",
        data[:version] + b"\7" + data[version + 1 :],  # JFIF 7.1
    ):
        np.testing.assert_array_equal(pixels(odd), pixels(data))
        np.testing.assert_array_equal(photo(odd), photo(data))  # a scaled decode


def test_limits():
    data = saved(scene(), "PNG")
    assert outcome(b"") == "empty"
    assert outcome(data, limits=Limits(max_bytes=len(data) - 1)) == "too_large"
    assert isinstance(outcome(data, limits=Limits(max_bytes=len(data))), Picture)
    assert outcome(data, limits=Limits(max_pixels=211 * 147 - 1)) == "too_many_pixels"
    assert isinstance(outcome(data, limits=Limits(max_pixels=211 * 147)), Picture)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_pixel_limit_in_every_format(kind):
    limits = Limits(max_pixels=211 * 147 - 1)
    for options in ({}, {"lossless": True}) if kind == "WEBP" else ({},):
        assert outcome(saved(scene(), kind, **options), limits=limits) == "too_many_pixels"


def png(width, height, bits, colour, *chunks):
    def chunk(name, body):
        crc = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    parts = b"".join(chunk(name, body) for name, body in (*chunks, (b"IEND", b"")))
    return b"\x89PNG\r\n\x1a\n" + head + parts


def test_large_headers_take_no_time():
    webp = bytearray(saved(scene().convert("RGBA").rotate(45), "WEBP"))
    assert webp[12:16] == b"VP8X"
    webp[24:30] = b"\xfe\x3f\x00" * 2  # 16383 x 16383
    start = time.process_time()
    assert outcome(bytes(webp)) == "too_many_pixels"
    assert outcome(png(2**31 - 1, 2**31 - 1, 8, 2)) == "too_many_pixels"
    assert outcome(b"P6 99999 99999 255\n") == "too_many_pixels"
    assert time.process_time() - start < 10


def test_tiles_larger_than_a_picture_are_refused():
    huge = [(322, 4, [60000]), (323, 4, [60000]), (324, 4, [8]), (325, 4, [16])]
    assert outcome(tiff(np.zeros((4, 4), "u1"), 1, extra=huge)) == "too_many_pixels"


def test_a_thousand_scans_are_refused():
    data = saved(scene(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    bomb = data[:last] + data[last:-2] * 1000 + data[-2:]
    assert outcome(bomb) == "corrupt"


def test_any_bytes_give_a_picture_or_a_reason(capfd, recwarn):
    rng = random.Random(5)
    files = list(whole_files().values())
    reasons = set()
    for _ in range(1500):
        data = bytearray(rng.choice(files))
        action = rng.random()
        if action < 0.3:
            del data[rng.randrange(len(data)) :]
        elif action < 0.8:
            for _ in range(rng.choice((1, 2, 8))):
                reach = min(len(data), rng.choice((60, 400, 10**9)))
                data[rng.randrange(reach)] = rng.randrange(256)
        else:
            start = rng.randrange(len(data))
            del data[start : start + rng.choice((1, 5, 500))]
        found = outcome(bytes(data), rng.choice((PHOTO, HUB)), Limits(max_pixels=10**7))
        reasons.add(found if isinstance(found, str) else "picture")
    assert reasons >= {"picture", "truncated", "corrupt", "too_many_pixels", "unsupported_format"}
    assert capfd.readouterr().err == ""
    assert not recwarn.list


# --- which colours


def tiff(samples, photometric, fmt=1, bits=None, extra=()):
    """A TIFF file of one uncompressed strip (TIFF 6.0)."""
    height, width = samples.shape[:2]
    count = samples.shape[2] if samples.ndim == 3 else 1
    bits = bits or samples.dtype.itemsize * 8
    tags = {
        256: (4, [width]), 257: (4, [height]), 258: (3, [bits] * count), 259: (3, [1]),
        262: (3, [photometric]), 273: (4, [8]), 277: (3, [count]), 278: (4, [height]),
        279: (4, [samples.nbytes]), 339: (3, [fmt] * count),
    }  # fmt: skip
    tags |= {tag: (kind, values) for tag, kind, values in extra}
    if 322 in tags:
        del tags[273], tags[278], tags[279]
    start = 8 + samples.nbytes
    beyond, entries, overflow = start + 2 + 12 * len(tags) + 4, b"", b""
    for tag, (kind, values) in sorted(tags.items()):
        body = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(body) > 4:
            overflow += body
            body = struct.pack("<I", beyond + len(overflow) - len(body))
        entries += struct.pack("<HHI", tag, kind, len(values)) + body.ljust(4, b"\0")
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0) + overflow
    return b"II*\0" + struct.pack("<I", start) + samples.tobytes() + directory


RAMP = np.arange(16).reshape(4, 4)  # of sixteenths: the grey levels 0, 17, ... 255
GREY = (RAMP * 17).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("8 bits", tiff(GREY, 1)),
        ("8 bits, white is zero", tiff(255 - GREY, 0)),
        ("16 bits", tiff((RAMP * 4369).astype("<u2"), 1)),
        ("16 bits, white is zero", tiff((65535 - RAMP * 4369).astype("<u2"), 0)),
        ("16 bits, signed", tiff((RAMP * 4369 - 32768).astype("<i2"), 1, 2)),
        ("32 bits", tiff((RAMP * 286331153).astype("<u4"), 1)),
        ("32 bits, signed", tiff((RAMP * 1000 - 4000).astype("<i4"), 1, 2)),
        ("float, 0 to 1", tiff((RAMP / 15).astype("<f4"), 1, 3)),
        ("float, other", tiff((RAMP * 1e30 - 3e30).astype("<f4"), 1, 3)),
        ("float, not a number", tiff(np.where(RAMP, RAMP / 15, np.nan).astype("<f4"), 1, 3)),
        ("PGM of 16 bits", b"P5 4 4 65535\n" + (RAMP * 4369).astype(">u2").tobytes()),
        ("PGM of 10 bits", b"P5 4 4 1020\n" + (RAMP * 68).astype(">u2").tobytes()),
        ("PGM of 4 bits", b"P5 4 4 15\n" + RAMP.astype(np.uint8).tobytes()),
        ("plain PGM", b"P2 4 4 15\n" + " ".join(map(str, RAMP.ravel())).encode()),
        ("PNG of 16 bits", saved(Image.fromarray((RAMP * 4369).astype(np.uint16)), "PNG")),
        ("RGB of 16 bits", tiff(np.dstack([(RAMP * 4369).astype("<u2")] * 3), 2)),
        ("CMYK", tiff(np.dstack([255 - GREY] * 3 + [0 * GREY]), 5)),
    ],
)
def test_grey_of_any_depth(name, data):
    np.testing.assert_array_equal(pixels(data), np.dstack([GREY] * 3))


def test_grey_of_12_bits():
    packed = np.array([[0x00, 0x08, 0x00], [0xFF, 0xF0, 0x0F]], np.uint8)  # 0, 2048 / 4095, 15
    data = tiff(packed[:, :2], 1, bits=12, extra=[(279, 4, [6])])
    data = data[:8] + packed.tobytes() + data[12:]
    shift = struct.pack("<I", 14)
    data = data[:4] + shift + data[8:]
    np.testing.assert_array_equal(pixels(data)[:, :, 0], [[0, 128], [255, 1]])


def test_black_and_white():
    bits = Image.new("1", (10, 6))
    bits.paste(1, (5, 0, 10, 6))
    for kind in ("PNG", "TIFF", "BMP", "GIF", "PPM"):
        out = pixels(saved(bits, kind))
        assert (out[:, :5] == 0).all()
        assert (out[:, 5:] == 255).all()
    group4 = pixels(saved(bits, "TIFF", compression="group4"))
    assert (group4[:, :5] == 0).all() and (group4[:, 5:] == 255).all()


def test_transparency_is_composited_on_white():
    colour = np.zeros((1, 3, 4), np.uint8)
    colour[0] = [(200, 100, 0, 0), (200, 100, 0, 128), (200, 100, 0, 255)]
    expected = [[255, 255, 255], [227, 177, 127], [200, 100, 0]]
    rgba = Image.fromarray(colour)
    for data in (
        saved(rgba, "PNG"),
        saved(rgba, "TIFF"),
        saved(rgba, "WEBP", lossless=True, exact=True),
        tiff(np.asarray(rgba.convert("RGBa")), 2, extra=[(338, 3, [1])]),  # premultiplied
    ):
        np.testing.assert_allclose(pixels(data)[0], expected, atol=1)
    grey = saved(Image.fromarray(colour[:, :, [0, 3]]), "PNG")
    np.testing.assert_allclose(pixels(grey)[0, :, 0], [255, 227, 200], atol=1)


def test_transparent_colours_of_png():
    grey = Image.fromarray(np.array([[0, 7, 9]], np.uint8))
    assert pixels(saved(grey, "PNG", transparency=7))[0, :, 0].tolist() == [0, 255, 9]
    deep = Image.fromarray(np.array([[0, 700, 65535]], np.uint16))
    assert pixels(saved(deep, "PNG", transparency=700))[0, :, 0].tolist() == [0, 255, 255]
    colour = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    out = pixels(saved(colour, "PNG", transparency=(1, 2, 3)))
    assert out.tolist() == [[[255, 255, 255], [4, 5, 6]]]
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    assert pixels(saved(palette, "PNG"))[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    out = pixels(saved(palette, "PNG", transparency=1))[0]
    assert out.tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]
    out = pixels(saved(palette, "PNG", transparency=bytes([255, 0, 128])))[0]
    np.testing.assert_allclose(out, [[255, 0, 0], [255, 255, 255], [127, 127, 255]], atol=1)
    out = pixels(saved(palette, "GIF", transparency=1))[0]
    assert out.tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]


def test_lab_and_ycbcr():
    # L* = 53.2, a* = 80.1, b* = 67.2 is sRGB's red (D65); Pillow keeps a* and b* with a sign.
    lab = np.array([[[136, 80, 67], [255, 0, 0], [0, 0, 0]]], np.int16).astype(np.uint8)
    out = pixels(tiff(lab, 8)).astype(int)[0]
    assert out[0][0] > 240 and out[0][1] < 60 and out[0][2] < 60
    np.testing.assert_allclose(out[1:], [[255] * 3, [0] * 3], atol=2)
    image = scene()
    out = pixels(saved(image.convert("YCbCr"), "TIFF", compression="tiff_lzw"))
    np.testing.assert_allclose(out, np.asarray(image), atol=4)


@pytest.mark.parametrize(
    "data",
    [
        tiff(np.zeros((4, 4), "<f8"), 1, 3),
        tiff(np.zeros((4, 4, 5), "u1"), 2),
        tiff(np.zeros((4, 4), "u1"), 1, extra=[(259, 3, [34713])]),  # Nikon's
        saved(scene().convert("YCbCr"), "TIFF"),
    ],
)
def test_tiff_variants_without_decoder_are_unsupported(data):
    assert outcome(data) == "unsupported_format"


def test_hopper_has_the_same_colours_in_every_format(shared):
    folder = shared / "images" / "nasty"
    reference = pixels((folder / "hopper.ppm").read_bytes()).astype(int)
    for name, distance in [
        ("hopper.png", 3),
        ("hopper.bmp", 3),
        ("hopper.tif", 3),
        ("hopper.jpg", 10),
        ("hopper.webp", 10),
        ("hopper.gif", 20),
    ]:
        out = pixels((folder / name).read_bytes())
        assert abs(out - reference).mean() <= distance, name


# --- which pixels


def jpegs():
    image, rng = scene(1023, 917), random.Random(3)
    for progressive in (False, True):
        for sampling in ("4:4:4", "4:2:2", "4:2:0"):
            size = (rng.randrange(900, 1023), rng.randrange(900, 917))
            yield saved(image.resize(size), "JPEG", subsampling=sampling, progressive=progressive)
    yield saved(image.convert("L"), "JPEG")
    yield saved(image.convert("CMYK"), "JPEG")
    yield saved(image, "JPEG", keep_rgb=True)
    yield saved(image, "JPEG", restart_marker_blocks=3)


def test_jpeg_pixels_are_pillows_bit_by_bit(shared):
    files = sorted((shared / "images" / "labelled").iterdir())[::8]
    files += sorted((shared / "images" / "orientation").glob("*_6.jpg"))
    files += [shared / "images" / "nasty" / f for f in NASTY if f.endswith(("jpg", "mpo"))]
    compared = 0
    for data in [*jpegs(), *(f.read_bytes() for f in files)]:
        if isinstance(outcome(data, HUB), Picture):
            expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            np.testing.assert_array_equal(pixels(data), expected)
            compared += 1
    assert compared > 40


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_scaled_jpeg_pixels_are_pillows_bit_by_bit(scale):
    for data in jpegs():
        image = Image.open(io.BytesIO(data))
        least = min(image.size) // scale
        scaling = PHOTO.jpeg_scaling.model_copy(update={"factor": 2, "floor": least})
        preset = PHOTO.model_copy(update={"jpeg_scaling": scaling})
        out = photo(data, (45, 50), preset)
        drafted = image.draft(None, (image.width // scale, image.height // scale))
        assert drafted is not None
        small = image.convert("RGB").resize((50, 45), Image.Resampling.BILINEAR, box=drafted[1])
        np.testing.assert_array_equal(out, np.asarray(small))


def test_photo_is_pillows_antialiased_bilinear(shared):
    for file in sorted((shared / "images" / "labelled").iterdir())[::10]:
        image = Image.open(file)
        if min(image.size) < 2 * 448:
            expected = image.convert("RGB").resize((161, 160), Image.Resampling.BILINEAR)
            np.testing.assert_array_equal(photo(file.read_bytes(), (160, 161)), expected)


def test_float_presets_equal_tensorflow(shared):
    tf = pytest.importorskip("tensorflow")
    sizes = [(224, 224), (160, 160), (97, 331)]
    shapes = set()
    for file in sorted((shared / "images" / "labelled").iterdir())[::10]:
        data = file.read_bytes()
        shapes.add(Image.open(file).size)
        image = tf.image.convert_image_dtype(pixels(data), tf.float32)
        crop = tf.image.central_crop(image, 0.875)[None]
        for size in sizes:
            out = np.empty((*size, 3), np.float32)
            decode(data, HUB, [out])
            np.testing.assert_allclose(out, tf.image.resize(image, size), rtol=0, atol=1e-5)
            decode(data, SLIM, [out])
            expected = tf.compat.v1.image.resize_bilinear(crop, size, align_corners=False)[0]
            np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    assert len(shapes) > 10


@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (3, 2), (37, 4999), (2501, 13), (224, 224)])
def test_float_presets_equal_tensorflow_on_odd_shapes(shape):
    tf = pytest.importorskip("tensorflow")
    noise = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), "PNG")
    image = tf.image.convert_image_dtype(noise, tf.float32)
    crop = tf.image.central_crop(image, 0.875)[None]
    for size in [(224, 224), (33, 45), (1, 1)]:
        out = np.empty((*size, 3), np.float32)
        decode(data, HUB, [out])
        np.testing.assert_allclose(out, tf.image.resize(image, size), rtol=0, atol=1e-5)
        decode(data, SLIM, [out])
        expected = tf.compat.v1.image.resize_bilinear(crop, size)[0]
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


def test_each_size_is_what_it_would_be_alone():
    data = saved(scene(2003, 1501), "JPEG")
    sizes = [(224, 224), (160, 160), (331, 331), (96, 640)]  # these need three scales
    for preset in (PHOTO, HUB, SLIM):
        together = [np.empty((*size, 3), preset.dtype) for size in sizes]
        decode(data, preset, together)
        for out in together:
            alone = np.empty_like(out)
            decode(data, preset, [alone])
            np.testing.assert_array_equal(out, alone)


def test_decode_writes_into_slices_of_a_batch():
    batch = np.zeros((3, 32, 32, 3), np.uint8)
    decode(saved(scene(), "PNG"), PHOTO, [batch[1]])
    assert batch[1].any()
    assert not batch[0].any() and not batch[2].any()


@pytest.mark.parametrize("out", [np.empty((8, 8, 3), np.float32), np.empty((8, 8), np.uint8)])
def test_wrong_outputs_are_the_callers_fault(out):
    with pytest.raises(ValueError, match="uint8"):
        decode(saved(scene(), "PNG"), PHOTO, [out])


def test_threads_get_the_same_pixels():
    files = list(whole_files().values())
    alone = [photo(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for out, expected in zip(pool.map(photo, files), alone, strict=True):
                np.testing.assert_array_equal(out, expected)


# --- which way up


def turned(orientation, kind):
    """The scene as it would be stored for that orientation, and the tag."""
    upright = scene()
    method = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    stored = upright if method is None else upright.transpose(method)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_in_every_format(kind, orientation):
    data = turned(orientation, kind)
    out = np.empty((90, 70, 3), np.uint8)
    assert decode(data, PHOTO, [out]) == Picture(kind, 211, 147)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    expected = np.asarray(expected.resize((70, 90), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(out.astype(int), expected, atol=2)


def test_hub_does_not_turn():
    assert outcome(turned(6, "JPEG"), HUB) == Picture("JPEG", 147, 211)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_senseless_orientation_is_none(value):
    assert outcome(turned(value, "JPEG")) == Picture("JPEG", 211, 147)


def test_the_eight_orientations_agree(shared):
    files = sorted((shared / "images" / "orientation").glob("*.jpg"))
    outs = [photo(f.read_bytes()).astype(np.float32) for f in files]
    assert len(outs) == 8
    for out in outs[1:]:  # each has its own number drawn on it
        assert np.abs(out - outs[0]).mean() < 6
    unturned = photo(files[5].read_bytes(), preset=PHOTO.model_copy(update={"exif_orientation": 0}))
    assert np.abs(unturned - outs[0]).mean() > 25


# --- what it does to vectors


def test_scaled_decode_hardly_moves_vectors(shared):
    tf = pytest.importorskip("tensorflow")
    hub = pytest.importorskip("tensorflow_hub")
    folder = shared / "modules" / "mobilenet_v2_050_224_feature_vector_1"
    module = hub.load(str(folder), tags=[]).signatures["default"]

    files = [f.read_bytes() for f in sorted((shared / "images" / "orientation").glob("*.jpg"))]
    for file in sorted((shared / "images" / "labelled").iterdir())[::8]:
        image = Image.open(file).convert("RGB")
        width = (1300, 2600)[len(files) % 2]
        height = round(width * image.height / image.width)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        files.append(saved(image, "JPEG", quality=90))
    full = PHOTO.model_copy(update={"jpeg_scaling": None})
    vectors = []
    for preset in (PHOTO, full):
        batch = np.stack([photo(data, preset=preset) for data in files])
        vectors.append(module(tf.constant(batch / np.float32(255)))["default"].numpy())
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in vectors)
    cosine = (a * b).sum(axis=1)
    assert np.median(cosine) < 1 - 1e-5  # the scaled decode was used
    assert np.percentile(cosine, 1) >= 0.999
