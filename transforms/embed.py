"""Pixels into feature vectors, and the transform for other people's pipelines."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import apache_beam as beam
import numpy as np

from hubbeam.modules.engines import choose_engine
from hubbeam.modules.engines.base import Engine, EngineChoice
from hubbeam.modules.errors import ImageError
from hubbeam.modules.images import Limits
from hubbeam.modules.presets import load_preset
from hubbeam.modules.spec import ResolvedModule
from hubbeam.modules.store import Store
from hubbeam.transforms.decode import decode_batch
from hubbeam.transforms.process import cores, this_process
from hubbeam.transforms.read import read_or_error


def embed_batch(
    engine: Engine, pixels: np.ndarray, width: int
) -> tuple[np.ndarray, dict[int, ImageError]]:
    """Runs a module on a batch; an image that makes it fail does not cost the others theirs.

    A batch that fails is halved until the guilty image is alone.

    Args:
      engine: runs the module.
      pixels: [n, height, width, 3], uint8 or float32 in [0, 1].
      width: values in a feature vector.

    Returns:
      float32 [n, width], and row -> error (`embed_failed` or `not_finite`) for rows without a
      usable vector.
    """
    if not len(pixels):
        return np.empty((0, width), np.float32), {}
    try:
        vectors = engine.run(pixels)
    except Exception as error:
        if len(pixels) == 1:
            message = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            return np.zeros((1, width), np.float32), {0: ImageError("embed_failed", message)}
        half = len(pixels) // 2
        first, first_errors = embed_batch(engine, pixels[:half], width)
        second, second_errors = embed_batch(engine, pixels[half:], width)
        errors = first_errors | {half + row: error for row, error in second_errors.items()}
        return np.concatenate([first, second]), errors
    finite = np.isfinite(vectors).all(axis=1)
    return vectors, {
        int(row): ImageError("not_finite", "the vector has NaN or infinity in it")
        for row in np.flatnonzero(~finite)
    }


class _EmbedBatchFn(beam.DoFn):
    """List of uris or (uri, bytes) -> (uri, vector), and rejects as a second output."""

    def __init__(
        self, module: ResolvedModule, choice: EngineChoice, preset: str, store: str | None
    ):
        self._module = module
        self._choice = choice
        self._preset = load_preset(preset)
        self._store = store
        self._limits = Limits()

    def setup(self) -> None:
        self._process = this_process()
        self._engine = self._process.engine(self._module, self._choice, self._store)

    def _read(self, element: str | tuple[str, bytes]) -> bytes | ImageError:
        return read_or_error(element, self._limits) if isinstance(element, str) else element[1]

    def process(self, batch: list[str | tuple[str, bytes]]) -> Iterator[Any]:
        uris = [element if isinstance(element, str) else element[0] for element in batch]
        contents = list(self._process.readers.map(self._read, batch))
        step = -(-len(contents) // self._process.threads)
        parts = [contents[start : start + step] for start in range(0, len(contents), step)]
        outcomes = chain.from_iterable(self._process.compute.map(self._embed, parts))
        for uri, outcome in zip(uris, outcomes, strict=True):
            if isinstance(outcome, np.ndarray):
                yield uri, outcome
                continue
            stage, error = outcome
            reject = {
                "uri": uri,
                "stage": stage,
                "reason": error.reason,
                "message": error.message,
            }
            yield beam.pvalue.TaggedOutput("rejects", reject)

    def _embed(
        self, contents: list[bytes | ImageError]
    ) -> list[np.ndarray | tuple[str, ImageError]]:
        """Gives the vector of each, or the stage and error that stood in its way."""
        size = self._module.image_size
        decoded = decode_batch(
            contents, self._preset, [size], self._limits, self._process.decoding.reserve
        )
        vectors, errors = embed_batch(self._engine, decoded.pixels[size], self._module.width)
        outcomes: dict[int, np.ndarray | tuple[str, ImageError]] = {
            position: ("read", data)
            for position, data in enumerate(contents)
            if isinstance(data, ImageError)
        }
        outcomes |= {position: ("decode", error) for position, error in decoded.errors.items()}
        for row, position in enumerate(decoded.positions.tolist()):
            outcomes[position] = ("embed", errors[row]) if row in errors else vectors[row]
        return [outcomes[position] for position in range(len(contents))]


class EmbedImages(beam.PTransform):
    """Uris, or pairs of uri and bytes, into pairs of uri and feature vector.

    The module is resolved and its engine chosen when the pipeline is built, so that what can fail
    fails before the job starts. Elements are batched; a batch never crosses a bundle.

    Example::

        vectors, rejects = uris | EmbedImages("mobilenet_v2_050_224")

    Two outputs: ``vectors``, pairs (uri, float32 array [width]); ``rejects``, dicts with ``uri``,
    ``stage``, ``reason`` (see `hubbeam.modules.errors.REASONS`) and ``message``.
    """

    def __init__(
        self,
        module: str,
        *,
        signature: str | None = None,
        preset: str = "photo",
        engine: str = "auto",
        batch_size: int = 32,
        store: str | None = None,
    ):
        """Resolves the module.

        Args:
          module: name of a configured module, path of a module YAML, or a handle.
          signature: signature to call; the module's own choice where it is None.
          preset: how a picture becomes the module's input.
          engine: what runs the graph.
          batch_size: images that are given to the module at once.
          store: local or ``gs://`` folder of resolved modules; workers read it.

        Raises:
          ConfigError: the module, preset or engine cannot be had.
        """
        super().__init__()
        opened = Store(store)
        self._module = opened.resolve(module, signature=signature)
        self._choice = choose_engine(opened, self._module, engine, threads=cores())
        self._fn = _EmbedBatchFn(self._module, self._choice, preset, store)
        self._batch_size = batch_size

    def expand(self, images: beam.PCollection[Any]) -> Any:
        return (
            images
            | "Batch"
            >> beam.BatchElements(min_batch_size=self._batch_size, max_batch_size=self._batch_size)
            | "Embed" >> beam.ParDo(self._fn).with_outputs("rejects", main="vectors")
        )
