"""Runs a module the way TensorFlow Hub does, and compares what comes out with what should."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hubbeam.modules.engines.base import agreement
from hubbeam.modules.engines.tensorflow import import_tensorflow
from hubbeam.modules.errors import ConfigError, RunError
from hubbeam.modules.inspect import choose, inspect_module
from hubbeam.modules.spec import CLASSES, ModuleInfo

_BATCH = 8


class Compared(NamedTuple):
    """How far one output of a module is from the expected values.

    Attributes:
      output: the signature's output.
      cosine: the smallest of all images, see `engines.base.agreement`.
      difference: the largest absolute one.
    """

    output: str
    cosine: float
    difference: float


def run_module(
    folder: Path, info: ModuleInfo, images: npt.NDArray[np.uint8], signature: str | None = None
) -> dict[str, npt.NDArray[np.float32]]:
    """Loads a module with `hub.load` and calls a signature.

    Args:
      folder: the module.
      info: what is in it.
      images: uint8 [n, h, w, 3] of the module's size; the module is given a 255th of them.
      signature: None for feature vectors.

    Returns:
      All outputs of the signature by key; the vectors float32 [n, width] are ``default`` in a TF1
      Hub module.

    Raises:
      RunError: TensorFlow cannot load or run it.
    """
    tf = import_tensorflow()
    import tensorflow_hub

    choice = choose(info, signature, folder.name)
    try:
        loaded = tensorflow_hub.load(str(folder), tags=[] if info.format == "hub1" else ["serve"])
        call = loaded.signatures[choice.signature]
        parts: list[dict[str, Any]] = []
        for start in range(0, len(images), _BATCH):
            pixels = tf.constant(images[start : start + _BATCH].astype(np.float32) / 255)
            parts.append(call(**{choice.input: pixels}))
    except Exception as e:
        # TensorFlow raises whatever it likes.
        raise RunError(f"the module in {folder} cannot be run: {type(e).__name__}: {e}") from e
    return {key: np.concatenate([part[key].numpy() for part in parts]) for key in parts[0]}


def compare_module(folder: Path, expected: str | Path) -> list[Compared]:
    """Compares a module with expected values.

    Args:
      folder: the module.
      expected: an ``.npz`` with ``images`` uint8 [n, h, w, 3], and one or more of ``features`` (the
        vectors), ``logits`` (of ``image_classification``), and inner end points by their names.

    Raises:
      ConfigError: the file is not so, or has nothing that the module has.
      RunError: the module cannot be run.
    """
    info = inspect_module(folder)
    choice = choose(info, None, folder.name)
    wanted = _load(expected)
    images = wanted.pop("images", None)
    if images is None or images.dtype != np.uint8 or images.shape[1:] != (*choice.image_size, 3):
        has = "none" if images is None else f"{images.dtype} {list(images.shape)}"
        size = "x".join(map(str, choice.image_size))
        raise ConfigError(f"{expected} must have `images`, uint8, {size}, RGB; it has {has}")
    outputs = run_module(folder, info, images)
    outputs["features"] = outputs[choice.output]
    if "logits" in wanted and CLASSES in info.signatures:
        head = choose(info, CLASSES, folder.name)
        outputs["logits"] = run_module(folder, info, images, CLASSES)[head.output]
    compared = []
    for key in sorted(wanted.keys() & outputs.keys()):
        actual, should = outputs[key], wanted[key]
        if actual.shape != should.shape:
            raise ConfigError(
                f"{expected}: {key} is {list(should.shape)}, not {list(actual.shape)}"
            )
        rows = (len(actual), -1)
        cosine = agreement(actual.reshape(rows), should.reshape(rows))
        compared.append(Compared(key, cosine, float(np.abs(actual - should).max())))
    if not compared:
        raise ConfigError(f"{expected} has none of the module's outputs, only {sorted(wanted)}")
    return compared


def _load(path: str | Path) -> dict[str, npt.NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, AttributeError) as e:
        raise ConfigError(f"{path} cannot be read as .npz: {e}") from e
