"""The job that a good engineer writes in an afternoon with what Beam and TF-Hub offer.

Beam's own `TFModelHandlerTensor` does not load a TF-Hub SavedModel (Keras 3 refuses it), so it has
the small `ModelHandler` that one writes then. Batching is on, the module's signature runs on all
cores, files are read and written by Beam's own transforms. Nothing of hubbeam is in it.

    python plain_beam.py 'photos/*' MODULE_FOLDER output/vectors
"""

import io
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import tensorflow as tf
import tensorflow_hub as hub
from apache_beam.io import fileio
from apache_beam.io.parquetio import WriteToParquet
from apache_beam.ml.inference.base import KeyedModelHandler, ModelHandler, RunInference
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from PIL import Image


class HubModuleHandler(ModelHandler[np.ndarray, np.ndarray, Any]):
    """Runs the feature vectors of a TF-Hub image module on batches of float32 pictures."""

    def __init__(self, module: str, batch_size: int = 32):
        super().__init__()
        self._module = module
        self._batch_size = batch_size

    def load_model(self) -> Any:
        """Loads the module once a process."""
        return hub.load(self._module)

    def run_inference(
        self, batch: Sequence[np.ndarray], model: Any, inference_args: Any = None
    ) -> Iterable[np.ndarray]:
        """Gives the vectors of a batch, float32 [width] each."""
        signature = model.signatures["image_feature_vector"]
        return signature(images=tf.constant(np.stack(batch)))["default"].numpy()

    def batch_elements_kwargs(self) -> dict[str, int]:
        """Tells Beam to make full batches."""
        return {"min_batch_size": self._batch_size, "max_batch_size": self._batch_size}


def decode(file: fileio.ReadableFile, size: int) -> tuple[str, np.ndarray]:
    """One file into its path and float32 [size, size, 3] in [0, 1]."""
    image = Image.open(io.BytesIO(file.read())).convert("RGB")
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), np.float32)
    return file.metadata.path, pixels / 255


def run(pattern: str, module: str, output: str, size: int = 224, args: Sequence[str] = ()) -> None:
    """Writes the feature vectors of all files that match to Parquet files `output-*`.

    Args:
      pattern: glob of the image files.
      module: folder of the module.
      output: first part of the names of the Parquet files.
      size: height and width of the module's input.
      args: Beam's options.
    """
    schema = pa.schema([("uri", pa.string()), ("vector", pa.list_(pa.float32()))])
    with beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions(list(args))) as pipeline:
        _ = (
            pipeline
            | fileio.MatchFiles(pattern)
            | beam.Reshuffle()
            | fileio.ReadMatches()
            | "Decode" >> beam.Map(decode, size)
            | RunInference(KeyedModelHandler(HubModuleHandler(module)))
            | "ToRow" >> beam.MapTuple(lambda uri, vector: {"uri": uri, "vector": vector})
            | WriteToParquet(output, schema, file_name_suffix=".parquet")
        )


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], sys.argv[3])
