"""Conservation, proved: what is in the written files of a shard, beside its plan."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import apache_beam as beam
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from hubbeam.modules.errors import RunError
from hubbeam.transforms import files
from hubbeam.transforms.job import ExtractJob
from hubbeam.transforms.plan import read_plan_shard
from hubbeam.transforms.write import REJECTS, local_copy, read_rejects, read_uris


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileReport(_Data):
    """A written file: path below the output, rows, bytes, and the sha256 of its bytes."""

    path: str
    rows: int
    size_bytes: int
    sha256: str


class ShardReport(_Data):
    """What is in the written files of a shard.

    Attributes:
      shard: index of the shard.
      images: images of its plan.
      kept: whether an earlier run had finished it.
      vectors: file of each module, by the module's name.
      rejects: file of rejects, None where there are none.
      rejects_by_reason: rejects of each module, by the module's name and then by reason.
      engines: what computed the vectors of each module, by the module's name; for a shard of
        TFRecord without vectors ``none``.
      rejected_images: images that gave no vector of at least one module.
    """

    shard: int
    images: int
    kept: bool = False
    vectors: dict[str, FileReport]
    rejects: FileReport | None
    rejects_by_reason: dict[str, dict[str, int]]
    engines: dict[str, str]
    rejected_images: int


def verify_shard(job: ExtractJob, shard: int) -> ShardReport:
    """Reads a shard's files whole and holds them against its plan.

    Every planned image must be there exactly once for each module, as a vector or as a reject.

    Args:
      job: the run.
      shard: index of the shard.

    Returns:
      Counts and checksums of the files.

    Raises:
      RunError: a file is missing, damaged, of another plan, or does not account for every image.
    """
    planned = _sorted(read_plan_shard(job.plan, shard, job.shards)["uri"])
    rejects_path = _where(job, job.rejects_path("", shard))
    rejects = _read_rejects(job, rejects_path)
    vectors, reasons, engines = {}, {}, {}
    for module in job.modules:
        path = _where(job, job.vectors_path("", module.name, shard))
        try:
            uris, metadata, stored = _read_vectors(path, module.width)
        except (ValueError, OSError) as error:
            raise RunError(f"{path}: missing or damaged: {error}") from error
        if metadata and metadata["plan"] != job.planned.plan_id:
            raise RunError(f"{path}: belongs to another plan")
        mine = rejects.filter(
            pc.or_kleene(pc.is_null(rejects["module"]), pc.equal(rejects["module"], module.name))
        )
        present = _sorted(pa.chunked_array([*uris.chunks, *mine["uri"].chunks], pa.string()))
        if not present.equals(planned):
            raise RunError(
                f"{path}: {len(uris)} vectors and {len(mine)} rejects do not account for the "
                f"{len(planned)} planned images"
            )
        vectors[module.name] = FileReport(
            path=job.vectors_path("", module.name, shard), rows=len(uris), **stored._asdict()
        )
        engine = metadata.get("engine")
        engines[module.name] = f"{engine['name']} {engine['version']}" if engine else "none"
        reasons[module.name] = dict(Counter(mine["reason"].to_pylist()))
    return ShardReport(
        shard=shard,
        images=len(planned),
        vectors=vectors,
        rejects=(
            FileReport(
                path=job.rejects_path("", shard),
                rows=rejects.num_rows,
                **_stored(rejects_path)._asdict(),
            )
            if rejects.num_rows
            else None
        ),
        rejects_by_reason=reasons,
        engines=engines,
        rejected_images=pc.count_distinct(rejects["uri"]).as_py(),
    )


def _where(job: ExtractJob, path: str) -> str:
    """Finds a file where shards are written, else where its publication has moved it to.

    Before that has begun, what stands in the output is of the run that this one replaces, and may
    have the same plan: the same images, whose content may be another by now.
    """
    written = files.join(job.root, path)
    if job.root == job.output or files.exists(written) or not files.exists(job.moving):
        return written
    return files.join(job.output, path)


def _read_rejects(job: ExtractJob, path: str) -> pa.Table:
    try:
        table, metadata = read_rejects(path)
    except FileNotFoundError:
        return REJECTS.empty_table()
    except (pa.ArrowInvalid, OSError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from error
    # What the output holds may still be of the run that this one replaces.
    return table if metadata.get("plan") == job.planned.plan_id else REJECTS.empty_table()


def _sorted(uris: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([uris.take(pc.sort_indices(uris)).combine_chunks()], pa.string())


class _Stored(NamedTuple):
    size_bytes: int
    sha256: str


def _read_vectors(path: str, width: int) -> tuple[pa.ChunkedArray, dict[str, Any], _Stored]:
    if not files.exists(path):
        raise FileNotFoundError("no such file")
    with local_copy(path) as copy, ThreadPoolExecutor(1) as beside:
        stored = beside.submit(_stored, copy)
        return *read_uris(copy, width), stored.result()


def _stored(path: str) -> _Stored:
    digest, size = hashlib.sha256(), 0
    with files.open_read(path) as file:
        while chunk := file.read(8 << 20):
            digest.update(chunk)
            size += len(chunk)
    return _Stored(size, digest.hexdigest())


@beam.typehints.with_input_types(tuple[int, Iterable[bool]])
@beam.typehints.with_output_types(ShardReport)
class _VerifyShardFn(beam.DoFn):
    def __init__(self, job: ExtractJob):
        self._job = job

    def process(self, element: tuple[int, Iterable[bool]]) -> Iterator[ShardReport]:
        shard, (kept,) = element
        yield verify_shard(self._job, shard).model_copy(update={"kept": kept})


class VerifyShards(beam.PTransform):
    """(shard index, kept) in; counts and checksums of its files out, or the run fails."""

    def __init__(self, job: ExtractJob):
        super().__init__()
        self._job = job

    def expand(self, shards: beam.PCollection[tuple[int, bool]]) -> beam.PCollection[ShardReport]:
        # Grouped, so that no shard is computed again because its verification is.
        return (
            shards
            | "Spread" >> beam.GroupByKey()
            | "VerifyShard" >> beam.ParDo(_VerifyShardFn(self._job))
        )
