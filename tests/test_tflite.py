"""TensorFlow Lite files of modules: float against TensorFlow, integer against pictures."""

import shutil
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tensorflow as tf

from hubbeam.modules import tflite
from hubbeam.modules.build import build_module
from hubbeam.modules.engines.tensorflow import TensorFlowEngine
from hubbeam.modules.errors import ConfigError
from hubbeam.modules.images import decode
from hubbeam.modules.presets import load_preset
from hubbeam.modules.spec import load_spec
from hubbeam.modules.store import resolve_folder


def interpret(file: Path, images: np.ndarray) -> np.ndarray:
    """Runs a TFLite model picture by picture; returns the real values of its output."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        interpreter = tf.lite.Interpreter(str(file))
    interpreter.allocate_tensors()
    [source], [result] = interpreter.get_input_details(), interpreter.get_output_details()
    scale, zero = result["quantization"]
    found = []
    for image in images:
        interpreter.set_tensor(source["index"], image[np.newaxis])
        interpreter.invoke()
        value = interpreter.get_tensor(result["index"])[0]
        found.append(value if scale == 0 else (value.astype(np.float32) - zero) * scale)
    return np.array(found)


def pictures(files: list[Path], size: int) -> np.ndarray:
    pixels = np.empty((len(files), size, size, 3), np.uint8)
    for file, out in zip(files, pixels, strict=True):
        decode(file.read_bytes(), load_preset("photo"), [out])
    return pixels


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray(np.sum(a * b, axis=1) / norms)


def test_original_module_to_float(original: Path, shared: Path, tmp_path: Path) -> None:
    expected = np.load(shared / "modules" / "mobilenet_v2_050_224_expected.npz")
    model = tflite.to_tflite(original, tmp_path / "new" / "m.tflite")
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["m.tflite"]
    [source], [result] = model.inputs, model.outputs
    assert model.tensors[source][:3] == ("images", "float32", (1, 224, 224, 3))
    assert model.tensors[result][1:3] == ("float32", (1, 1280))
    assert not model.integer
    found = interpret(tmp_path / "new" / "m.tflite", expected["images"] / np.float32(255))
    assert np.abs(found - expected["features"]).max() < 1e-4 * expected["features"].max()


def test_original_module_to_uint8(original: Path, labelled: list[Path], tmp_path: Path) -> None:
    folder = labelled[0].parent
    file = tmp_path / "m.tflite"
    model = tflite.to_tflite(original, file, uint8=True, calibration=str(folder / "*_1*.jpg"))
    assert model.integer
    [source], [result] = model.inputs, model.outputs
    assert model.tensors[source][1:3] == ("uint8", (1, 224, 224, 3))
    # The whole range of a byte is [-1, 1], whatever the pictures have in them.
    np.testing.assert_allclose(model.tensors[source].scale, [2 / 255], rtol=1e-6)
    assert model.tensors[source].zero_point[0] in (127, 128)
    assert model.tensors[result].dtype == "uint8"
    kernels = {t.dtype for t in model.tensors if len(t.shape) == 4 and t.value is not None}
    assert kernels == {"int8"}
    pixels = pictures(labelled[2::10], 224)
    engine = TensorFlowEngine(original, resolve_folder(original))
    found = cosines(interpret(file, pixels), engine.run(pixels))
    assert np.median(found) > 0.96
    assert np.percentile(found, 10) > 0.9


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("mobilenet_v2_050_160", "tf2"),
        ("inception_v2", "hub1"),
        ("nasnet_mobile", "hub1"),
    ],
)
def test_built_modules(
    name: str, format: Literal["hub1", "tf2"], photos: Path, tmp_path: Path
) -> None:
    spec = load_spec(name)
    folder = build_module(spec, tmp_path / name, format=format, untrained=True)
    pixels = pictures(sorted(photos.glob("*.jpg"))[:4], spec.image_size)
    wanted = TensorFlowEngine(folder, resolve_folder(folder)).run(pixels)
    assert wanted.shape == (4, spec.width)

    tflite.to_tflite(folder, tmp_path / "f.tflite")
    found = interpret(tmp_path / "f.tflite", pixels / np.float32(255))
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()

    model = tflite.to_tflite(folder, tmp_path / "u.tflite", uint8=True, calibration=pixels)
    assert model.integer
    assert Counter(t.dtype for t in model.tensors)["int8"] > 100
    found = interpret(tmp_path / "u.tflite", pixels)
    assert cosines(found, wanted).min() > 0.99


def test_calibration_is_asked_for(original: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no quantisation ranges of its own.*--calibration"):
        tflite.to_tflite(original, tmp_path / "m.tflite", uint8=True)
    assert not (tmp_path / "m.tflite").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": "x/*.jpg"}, "only for a uint8 model"),
        ({"uint8": True, "calibration": "nothing/*.jpg"}, "no calibration picture in nothing"),
        (
            {"uint8": True, "calibration": np.zeros((2, 160, 160, 3), np.uint8)},
            r"are uint8 \[2, 160, 160, 3\], not uint8 \[n, 224, 224, 3\]",
        ),
        ({"signature": "image_classification"}, "no signature 'image_classification'"),
    ],
)
def test_wrong_use(options: dict[str, Any], message: str, original: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        tflite.to_tflite(original, tmp_path / "m.tflite", **options)


def test_unreadable_calibration_pictures(original: Path, photos: Path, tmp_path: Path) -> None:
    """They are left out; if no other is there, the last one's fault is told."""
    (tmp_path / "a.jpg").write_bytes(b"<html>")
    pattern = str(tmp_path / "**" / "*.jpg")
    with pytest.raises(ConfigError, match=r"a\.jpg: unsupported_format"):
        tflite.to_tflite(original, tmp_path / "m.tflite", uint8=True, calibration=[pattern])
    (tmp_path / "more").mkdir()
    shutil.copy(sorted(photos.glob("*.jpg"))[0], tmp_path / "more" / "b.jpg")
    model = tflite.to_tflite(original, tmp_path / "m.tflite", uint8=True, calibration=[pattern])
    assert model.integer


def test_only_tflite_models_are_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no TensorFlow Lite model"):
        tflite.read_tflite(b"not a model")
