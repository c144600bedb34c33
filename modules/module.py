"""One module, loaded and ready: pictures in, vectors out."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hubbeam.modules.engines.base import Engine
from hubbeam.modules.errors import ConfigError, ImageError
from hubbeam.modules.files import read
from hubbeam.modules.images import decode
from hubbeam.modules.presets import Preset, load_preset
from hubbeam.modules.spec import ResolvedModule
from hubbeam.modules.store import Store

Picture = str | os.PathLike[str] | bytes | npt.NDArray[Any]


class Module:
    """A loaded module. Threads may share it.

    ::

      module = Module.load("mobilenet_v2_050_224")
      vectors = module.embed(["a.jpg", array])  # float32 [2, 1280]

    Attributes:
      resolved: what it is, pinned.
      engine: what runs its graph.
      preset: how a picture becomes its input.
    """

    def __init__(self, resolved: ResolvedModule, engine: Engine, preset: Preset, threads: int = 1):
        self.resolved = resolved
        self.engine = engine
        self.preset = preset
        self._threads = threads

    @classmethod
    def load(
        cls,
        name_or_handle: str,
        *,
        store: Store | str | Path | None = None,
        signature: str | None = None,
        engine: str = "auto",
        preset: str = "photo",
    ) -> "Module":
        """Loads a module, fetching it into the store if it is not there.

        Args:
          name_or_handle: see `Store.resolve`.
          store: the store or its place; None takes ``$HUBBEAM_STORE``, else the user's cache.
          signature: None for feature vectors; ``image_classification`` for logits.
          engine: ``auto``, or what must run the graph.
          preset: how pictures become the module's input, see `load_preset`.

        Raises:
          ConfigError: there is no such module, preset or engine.
        """
        # Engines bring TensorFlow: names and presets that are wrong are told before.
        how = load_preset(preset)
        modules = store if isinstance(store, Store) else Store(store)
        resolved = modules.resolve(name_or_handle, signature=signature)
        from hubbeam.modules.engines import load_engine

        threads = os.cpu_count() or 1
        return cls(resolved, load_engine(modules, resolved, engine, threads=threads), how, threads)

    @property
    def name(self) -> str:
        """The module's name."""
        return self.resolved.name

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the module's input in pixels."""
        return self.resolved.image_size

    @property
    def width(self) -> int:
        """Values in a vector."""
        return self.resolved.width

    def embed(self, images: Iterable[Picture]) -> npt.NDArray[np.float32]:
        """Gives the vectors of pictures.

        Args:
          images: each is the path (local or ``gs://``) or the bytes of an image file, or an RGB
            array [h, w, 3] of any size: uint8, or float in [0, 1]. Float arrays that have the
            module's size already are taken as they are; others are rounded to 8 bits first.

        Returns:
          float32 [n, width], in the order of `images`.

        Raises:
          ImageError: a picture cannot be used; the message names it.
        """
        if isinstance(images, (str, bytes, os.PathLike)):
            raise TypeError("embed takes a list of images, not one image")
        vectors: list[npt.NDArray[np.float32]] = []
        size = self.engine.batch_size
        left = enumerate(images)
        with ThreadPoolExecutor(self._threads) as pool:
            while batch := list(islice(left, max(32, size * self.engine.streams))):
                inputs = [*pool.map(self._input, batch)]
                parts = [_stack(inputs[i : i + size]) for i in range(0, len(inputs), size)]
                vectors.extend(pool.map(self.run, parts))
        return np.concatenate(vectors) if vectors else np.empty((0, self.width), np.float32)

    def run(self, pixels: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Runs the module on its own kind of input.

        Args:
          pixels: [n, h, w, 3] of the module's size, RGB: uint8 in 0..255 or float32 in [0, 1].

        Returns:
          float32 [n, width].
        """
        return self.engine.run(pixels)

    def _input(self, numbered: tuple[int, Picture]) -> npt.NDArray[Any]:
        """Returns the module's input for one picture."""
        number, picture = numbered
        if isinstance(picture, np.ndarray):
            name, array = f"image {number}", picture
            if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
                raise ImageError("corrupt", f"{name}: not [h, w, 3] but {list(array.shape)}")
            if np.issubdtype(array.dtype, np.floating):
                if not (array.min() >= 0 and array.max() <= 1):  # false for NaN, too
                    raise ImageError("corrupt", f"{name}: float pixels must lie in [0, 1]")
                if array.shape[:2] == self.image_size:
                    return array.astype(np.float32)
                array = np.rint(array * 255).astype(np.uint8)
            if array.dtype != np.uint8:
                raise ImageError("corrupt", f"{name}: neither uint8 nor float but {array.dtype}")
            # As a file of plain pixels it takes the same way as any other.
            data = b"P6 %d %d 255\n" % (array.shape[1], array.shape[0]) + array.tobytes()
        elif isinstance(picture, bytes):
            name, data = f"image {number}", picture
        else:
            name = os.fspath(picture)
            data = _file(name)
        out = np.empty((*self.image_size, 3), self.preset.dtype)
        try:
            decode(data, self.preset, [out])
        except ImageError as e:
            raise ImageError(e.reason, f"{name}: {e.message}") from e
        return out


def _file(path: str) -> bytes:
    try:
        data = read(path)
    except ConfigError as e:
        denied = isinstance(e.__cause__, PermissionError)
        raise ImageError("permission_denied" if denied else "read_failed", str(e)) from e
    if data is None:
        raise ImageError("not_found", f"{path}: there is no such file")
    return data


def _stack(inputs: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Stacks inputs; 8 bits become float where some of the batch are."""
    if len({x.dtype for x in inputs}) == 1:
        return np.stack(inputs)
    return np.stack([x if x.dtype == np.float32 else x.astype(np.float32) / 255 for x in inputs])
