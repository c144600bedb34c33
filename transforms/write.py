"""Shards of vectors and rejects: their schemas, how they are written, how they are read back.

Parquet is Arrow all the way. TFRecord is written by TensorFlow itself.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hubbeam.modules.engines.base import Engine
from hubbeam.modules.engines.tensorflow import import_tensorflow
from hubbeam.modules.spec import ResolvedModule
from hubbeam.transforms import files
from hubbeam.transforms.job import ExtractJob

METADATA_KEY = "hubbeam"
"""Key of the JSON in a Parquet file's metadata, and of the feature in a TFRecord's first record."""

ROW_GROUP_BYTES = 16 << 20

_SMALL_READS = {"pre_buffer": False, "buffer_size": 256 << 10}
"""To read a file through once: fresh memory for whole row groups takes longer than the reading."""

REJECTS = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("sha256", pa.string()),
        pa.field("module", pa.string()),
    ]
)
"""Schema of the rejects; `module` is null where the image gave no vector of any module."""

PICTURE_FIELDS = [
    pa.field("uri", pa.string(), nullable=False),
    pa.field("sha256", pa.string(), nullable=False),
    pa.field("size_bytes", pa.int64(), nullable=False),
    pa.field("modified", pa.timestamp("us", tz="UTC")),
    pa.field("width", pa.int32(), nullable=False),
    pa.field("height", pa.int32(), nullable=False),
    pa.field("format", pa.string(), nullable=False),
]
"""Columns of a shard of vectors that do not depend on the module."""


def vectors_schema(width: int) -> pa.Schema:
    """Returns the schema of a shard of vectors with `width` float32 values each."""
    return pa.schema([*PICTURE_FIELDS, pa.field("vector", _vector_type(width), nullable=False)])


def _vector_type(width: int) -> pa.DataType:
    return pa.list_(pa.field("element", pa.float32(), nullable=False), width)


def vectors_batch(pictures: pa.RecordBatch, vectors: np.ndarray) -> pa.RecordBatch:
    """Puts vectors beside the columns of their pictures, without copying the values.

    Args:
      pictures: the columns `PICTURE_FIELDS`, n rows.
      vectors: float32 [n, width].

    Returns:
      A batch of `vectors_schema`.
    """
    width = vectors.shape[1]
    values = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(values, type=_vector_type(width))
    return pa.RecordBatch.from_arrays([*pictures.columns, column], schema=vectors_schema(width))


def dataset_metadata(job: ExtractJob, module: ResolvedModule) -> dict[str, Any]:
    """Returns what all shards of a module say of themselves (see the README)."""
    return {
        "hubbeam": version("hubbeam"),
        "plan": job.planned.plan_id,
        "shards": job.shards,
        "module": {
            key: value for key, value in module.model_dump(mode="json").items() if key != "entry"
        },
        "preset": job.planned.meaning.preset.stamp(),
        "versions": {name: version(name) for name in ("apache-beam", "numpy", "pillow", "pyarrow")},
    }


class VectorsWriter(Protocol):
    """Takes the batches of one shard, in order."""

    def write(self, batch: pa.RecordBatch) -> None:
        """Appends a batch of `vectors_schema`."""

    def close(self) -> None:
        """Ends the file."""


class _ParquetShard:
    """Writes row groups of about `ROW_GROUP_BYTES`, however the batches are cut."""

    def __init__(self, path: str, module: ResolvedModule, metadata: dict[str, Any]):
        schema = vectors_schema(module.width).with_metadata({METADATA_KEY: json.dumps(metadata)})
        self._rows = max(1, ROW_GROUP_BYTES // (4 * module.width + 256))
        self._batches: list[pa.RecordBatch] = []
        self._waiting = 0
        self._schema = schema
        self._writer = pq.ParquetWriter(
            path,
            schema,
            compression={
                **{field.name: "zstd" for field in PICTURE_FIELDS},
                "vector.list.element": "none",
            },
            use_dictionary=["format"],
            write_statistics=["uri"],
            write_page_checksum=True,
        )

    def write(self, batch: pa.RecordBatch) -> None:
        self._batches.append(batch)
        self._waiting += batch.num_rows
        while self._waiting >= self._rows:
            self._write_group(self._rows)

    def _write_group(self, rows: int) -> None:
        table = pa.Table.from_batches(self._batches, self._schema)
        self._writer.write_table(table.slice(0, rows), row_group_size=rows)
        rest = table.slice(rows)
        self._batches, self._waiting = rest.to_batches(), rest.num_rows

    def close(self) -> None:
        if self._waiting:
            self._write_group(self._waiting)
        self._writer.close()


class _TFRecordShard:
    """Writes one ``tf.train.Example`` a row; the first of a file also holds its metadata."""

    def __init__(self, path: str, metadata: dict[str, Any], compression: str):
        tf = self._tf = import_tensorflow()
        self._metadata: str | None = json.dumps(metadata)
        self._writer = tf.io.TFRecordWriter(path, options="GZIP" if compression == "gzip" else None)

    def write(self, batch: pa.RecordBatch) -> None:
        train = self._tf.train
        width = batch.schema.field("vector").type.list_size
        vectors = batch.column("vector").flatten().to_numpy().reshape(-1, width)
        modified = pc.fill_null(batch.column("modified").cast(pa.int64()), -1)
        pictures = batch.drop_columns(["vector", "modified"]).to_pylist()
        for picture, when, vector in zip(pictures, modified.to_pylist(), vectors, strict=True):
            feature = {"modified": train.Feature(int64_list=train.Int64List(value=[when]))}
            for name, value in picture.items():
                feature[name] = (
                    train.Feature(bytes_list=train.BytesList(value=[value.encode()]))
                    if isinstance(value, str)
                    else train.Feature(int64_list=train.Int64List(value=[value]))
                )
            feature["vector"] = train.Feature(float_list=train.FloatList(value=vector))
            if self._metadata is not None:
                feature[METADATA_KEY] = train.Feature(
                    bytes_list=train.BytesList(value=[self._metadata.encode()])
                )
                self._metadata = None
            example = train.Example(features=train.Features(feature=feature))
            self._writer.write(example.SerializeToString(deterministic=True))

    def close(self) -> None:
        self._writer.close()


@contextmanager
def open_shard(
    job: ExtractJob, shard: int, engines: Sequence[Engine]
) -> Iterator[list[VectorsWriter]]:
    """Opens one writer a module; the files appear when all of them have been written whole.

    Args:
      job: the run.
      shard: index of the shard.
      engines: what computes the vectors, in the order of ``job.modules``.

    Yields:
      Writers in the order of ``job.modules``.
    """
    meaning = job.planned.meaning
    with ExitStack() as stack:
        writers: list[VectorsWriter] = []
        for module, engine in zip(job.modules, engines, strict=True):
            path = job.vectors_path(job.root, module.name, shard)
            name = stack.enter_context(files.write_whole(path)).name
            metadata = {
                **dataset_metadata(job, module),
                "shard": shard,
                "engine": {"name": engine.name, "version": engine.version},
            }
            writers.append(
                _ParquetShard(name, module, metadata)
                if meaning.format == "parquet"
                else _TFRecordShard(name, metadata, meaning.compression)
            )
        yield writers
        for writer in writers:
            writer.close()


def write_rejects(job: ExtractJob, shard: int, rejects: pa.Table) -> None:
    """Writes a shard's rejects, or removes those of an earlier try when there are none now."""
    path = job.rejects_path(job.root, shard)
    if rejects.num_rows == 0:
        files.delete(path)
        return
    stamp = json.dumps({"hubbeam": version("hubbeam"), "plan": job.planned.plan_id})
    with files.write_whole(path) as file:
        pq.write_table(
            rejects.replace_schema_metadata({METADATA_KEY: stamp}), file, compression="zstd"
        )


def read_rejects(path: str) -> tuple[pa.Table, dict[str, Any]]:
    """Reads a file of rejects and its metadata.

    Raises:
      FileNotFoundError: there is none.
      pa.ArrowInvalid: the file is damaged.
    """
    if not files.exists(path):
        raise FileNotFoundError(path)
    with files.open_read(path) as file:
        table = pq.ParquetFile(file).read()
    metadata = (table.schema.metadata or {}).get(METADATA_KEY.encode(), b"{}")
    return table.cast(REJECTS), json.loads(metadata)


def read_uris(path: str, width: int) -> tuple[pa.ChunkedArray, dict[str, Any]]:
    """Reads a local shard of vectors whole, a little at a time, so that damage is found.

    Args:
      path: a local file, as `local_copy` gives.
      width: values that each vector must have.

    Returns:
      The uris, and the shard's metadata (empty for a TFRecord shard without rows).

    Raises:
      ValueError: the file is damaged (`pa.ArrowInvalid` is one), or its vectors have another width.
      OSError: it is damaged, or cannot be read.
    """
    if not path.endswith(".parquet"):
        return _read_tfrecord(path, width)
    uris: list[pa.Array] = []
    with pq.ParquetFile(path, page_checksum_verification=True, **_SMALL_READS) as file:
        if file.schema_arrow.field("vector").type != _vector_type(width):
            raise ValueError(f"{path}: the vectors do not have {width} values")
        for batch in file.iter_batches(256, columns=["uri", "vector"], use_threads=False):
            uris.append(batch["uri"])
        metadata = (file.schema_arrow.metadata or {}).get(METADATA_KEY.encode(), b"{}")
    return pa.chunked_array(uris, pa.string()), json.loads(metadata)


def tfrecord_features(width: int) -> dict[str, dict[str, Any]]:
    """Returns the parse spec of a TFRecord dataset: arguments of ``tf.io.FixedLenFeature``."""
    text = {"shape": [], "dtype": "string"}
    number = {"shape": [], "dtype": "int64"}
    return {
        "uri": text,
        "sha256": text,
        "size_bytes": number,
        "modified": {**number, "default_value": -1},
        "width": number,
        "height": number,
        "format": text,
        "vector": {"shape": [width], "dtype": "float32"},
        METADATA_KEY: {**text, "default_value": ""},
    }


def _read_tfrecord(path: str, width: int) -> tuple[pa.ChunkedArray, dict[str, Any]]:
    tf = import_tensorflow()
    uris: list[str] = []
    metadata: dict[str, Any] = {}
    compression = "GZIP" if path.endswith(".gz") else ""
    try:
        for record in tf.data.TFRecordDataset(path, compression).as_numpy_iterator():
            feature = tf.train.Example.FromString(record).features.feature
            if not uris and METADATA_KEY in feature:
                metadata = json.loads(feature[METADATA_KEY].bytes_list.value[0])
            if len(feature["vector"].float_list.value) != width:
                raise ValueError(f"{path}: the vectors do not have {width} values")
            uris.append(feature["uri"].bytes_list.value[0].decode())
    except tf.errors.OpError as error:
        raise ValueError(f"{path}: {error.message}") from error
    return pa.chunked_array([pa.array(uris, pa.string())]), metadata


@contextmanager
def local_copy(path: str) -> Iterator[str]:
    """Yields the path itself where it is local, else the path of a temporary copy."""
    if files.is_local(path):
        yield path
        return
    with (
        NamedTemporaryFile(suffix=Path(path).name) as copy,
        files.open_read(path) as source,
    ):
        while chunk := source.read(8 << 20):
            copy.write(chunk)
        copy.flush()
        yield copy.name
