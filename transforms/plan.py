"""Divides a listing into shards: sorted by uri, duplicates dropped, one Parquet file a shard."""

import hashlib
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from hubbeam.modules.errors import ConfigError
from hubbeam.transforms import files
from hubbeam.transforms.listing import LISTING

IMAGES_PER_SHARD = 8192
"""Default size of a shard: small enough to spread and to repeat."""

_MIN_IMAGES_PER_SHARD = 256
_SHARDS_PER_WORKER = 4
_MEMORY_LIMIT = "1GB"
_INSERT_ROWS = 131_072

# Which of several rows of one uri is kept must not depend on the order of the listing: the one
# that is no reject and knows most.
_ORDER = "uri, reason NULLS FIRST, size_bytes NULLS LAST, modified NULLS LAST, message NULLS FIRST"


class PlanSummary(BaseModel):
    """What a plan holds.

    Attributes:
      images: rows of all shards, list rejects included.
      duplicates: rows dropped because their uri was listed before.
      size_bytes: sum of the sizes that are known.
      shards: number of shards.
      list_rejects: number of rows that are rejects of the listing, by reason.
      sha256: hash over the files of the shards: the same rows, the same hash.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int
    duplicates: int
    size_bytes: int
    shards: int
    list_rejects: dict[str, int]
    sha256: str


def shard_name(shard: int, shards: int) -> str:
    """Names the plan file of a shard."""
    return f"plan-{shard:05d}-of-{shards:05d}.parquet"


def count_shards(
    images: int,
    *,
    images_per_shard: int | None = None,
    shards: int | None = None,
    workers: int = 1,
) -> int:
    """Says into how many shards to divide.

    By default shards of at most `IMAGES_PER_SHARD` images; more, smaller ones while several workers
    would get fewer than four each, but none below 256 images for that.

    Args:
      images: how many there are.
      images_per_shard: at most so many in a shard.
      shards: just so many, unless there are fewer images.
      workers: that share the work.

    Raises:
      ConfigError: if both, or a number below 1, are given.
    """
    if shards is not None and images_per_shard is not None:
        raise ConfigError("--shards and --images-per-shard exclude each other")
    if shards is not None and shards < 1:
        raise ConfigError(f"--shards must be at least 1, not {shards}")
    if images_per_shard is not None and images_per_shard < 1:
        raise ConfigError(f"--images-per-shard must be at least 1, not {images_per_shard}")
    if shards is not None:
        count = min(shards, images)
    elif images_per_shard is not None:
        count = -(-images // images_per_shard)
    else:
        count = max(
            -(-images // IMAGES_PER_SHARD),
            min(_SHARDS_PER_WORKER * workers, images // _MIN_IMAGES_PER_SHARD)
            if workers > 1
            else 0,
            min(images, 1),
        )
    if count > 99_999:
        raise ConfigError(f"{count} shards are too many (at most 99999): make them larger")
    return count


def write_plan(
    listing: Iterable[pa.RecordBatch],
    plan_dir: str,
    *,
    images_per_shard: int | None = None,
    shards: int | None = None,
    workers: int = 1,
) -> PlanSummary:
    """Sorts a listing, drops duplicate uris, and writes one Parquet file a shard.

    The plan depends on the rows alone, not on their order. Shards differ by one row at most. Rows
    that are rejects of the listing belong to shards like the others. Memory stays bounded:
    DuckDB sorts out of core in a temporary folder (about 300 bytes an image).

    Args:
      listing: batches of schema `LISTING`; read to the end before anything is written.
      plan_dir: folder of the plan, on any Beam filesystem. It holds no other plan.
      images_per_shard: see `count_shards`.
      shards: see `count_shards`.
      workers: see `count_shards`.

    Returns:
      What the plan holds.

    Raises:
      ConfigError: for sizes that make no sense, and what reading `listing` raises.
    """
    count_shards(1, images_per_shard=images_per_shard, shards=shards, workers=workers)
    with tempfile.TemporaryDirectory(prefix="hubbeam-plan-") as scratch:
        spool = Path(scratch) / "sorted.arrow"
        rows, counts = _sort(listing, Path(scratch), spool)
        number = count_shards(
            rows, images_per_shard=images_per_shard, shards=shards, workers=workers
        )
        sha256 = _write_shards(spool, plan_dir, rows, number)
    # Else Arrow keeps what sorting took, a kilobyte an image, beside all that comes after.
    pa.default_memory_pool().release_unused()
    return PlanSummary(
        images=rows,
        duplicates=counts.pop("duplicates", 0),
        size_bytes=counts.pop("size_bytes", 0),
        shards=number,
        list_rejects=dict(sorted(counts.items())),
        sha256=sha256,
    )


def read_plan_shard(plan_dir: str, shard: int, shards: int) -> pa.Table:
    """Reads the rows of one shard, schema `LISTING`, in uri order."""
    data = files.read_bytes(files.join(plan_dir, shard_name(shard, shards)))
    # Not read_table: that imports pyarrow.dataset, which takes longer than a whole plan.
    return pq.ParquetFile(pa.BufferReader(data)).read().cast(LISTING)


def _sort(
    listing: Iterable[pa.RecordBatch], scratch: Path, spool: Path
) -> tuple[int, "Counter[str]"]:
    """Writes the rows of `listing`, sorted and without duplicates, to the Arrow file `spool`."""
    counts: Counter[str] = Counter()
    rows = 0
    config = {
        "memory_limit": _MEMORY_LIMIT,
        "temp_directory": str(scratch / "spill"),
        "preserve_insertion_order": "false",
        "threads": "2",
    }
    with (
        duckdb.connect(str(scratch / "listing.duckdb"), config=config) as db,
        pa.OSFile(str(spool), "wb") as file,
        pa.ipc.new_stream(
            file, LISTING, options=pa.ipc.IpcWriteOptions(compression="lz4")
        ) as writer,
    ):
        db.execute(
            "CREATE TABLE listing (uri VARCHAR NOT NULL, size_bytes BIGINT, modified BIGINT, "
            "reason VARCHAR, message VARCHAR)"
        )
        for table in _chunks(listing):
            # Times as plain numbers: DuckDB would bind them to the session's time zone.
            at = LISTING.get_field_index("modified")
            plain = table.set_column(at, "modified", table.column(at).cast(pa.int64()))
            db.register("chunk", plain)
            db.execute("INSERT INTO listing SELECT * FROM chunk")
            db.unregister("chunk")
        last: pa.Scalar = pa.scalar(None, pa.string())
        for batch in _stream(db, f"SELECT * FROM listing ORDER BY {_ORDER}"):
            uris = batch.column(0)
            before = pa.concat_arrays([pa.array([last.as_py()], pa.string()), uris[:-1]])
            new = pc.fill_null(pc.not_equal(uris, before), True)
            last = uris[-1]
            kept = batch.filter(new)
            counts["duplicates"] += len(batch) - len(kept)
            counts["size_bytes"] += pc.sum(kept.column(1)).as_py() or 0
            for entry in pc.value_counts(kept.column(3).drop_null()).to_pylist():
                counts[entry["values"]] += entry["counts"]
            rows += len(kept)
            writer.write_batch(
                pa.record_batch(
                    [c.cast(f.type) for c, f in zip(kept.columns, LISTING, strict=True)],
                    schema=LISTING,
                )
            )
    return rows, counts


def _chunks(listing: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    batches: list[pa.RecordBatch] = []
    rows = 0
    for batch in listing:
        batches.append(batch)
        rows += len(batch)
        if rows >= _INSERT_ROWS:
            yield pa.Table.from_batches(batches, LISTING)
            batches, rows = [], 0
    if rows:
        yield pa.Table.from_batches(batches, LISTING)


def _stream(db: Any, query: str) -> Iterator[pa.RecordBatch]:
    relation = db.sql(query)
    # DuckDB 2 renamed it.
    reader = getattr(relation, "to_arrow_reader", None) or relation.fetch_arrow_reader
    for batch in reader(65_536):
        if len(batch):
            yield batch


def _write_shards(spool: Path, plan_dir: str, rows: int, shards: int) -> str:
    """Writes all shards, some at a time; returns a hash over their files."""
    digest = hashlib.sha256()
    waiting: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(8, thread_name_prefix="plan") as pool:
        for shard, table in enumerate(_cut(spool, rows, shards)):
            path = files.join(plan_dir, shard_name(shard, shards))
            waiting.append(pool.submit(_write_shard, path, table))
            if len(waiting) >= 16:
                digest.update(waiting.popleft().result())
        for future in waiting:
            digest.update(future.result())
    return digest.hexdigest()


def _write_shard(path: str, table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    files.write_bytes(path, data)
    return hashlib.sha256(data).digest()


def _cut(spool: Path, rows: int, shards: int) -> Iterator[pa.Table]:
    """Cuts the sorted rows into `shards` tables that differ by one row at most."""
    with pa.OSFile(str(spool), "rb") as file, pa.ipc.open_stream(file) as reader:
        held: list[pa.RecordBatch] = []
        have = 0
        for shard in range(shards):
            need = (shard + 1) * rows // shards - shard * rows // shards
            while have < need:
                batch = reader.read_next_batch()
                held.append(batch)
                have += len(batch)
            table = pa.Table.from_batches(held, LISTING)
            yield table.slice(0, need)
            held = table.slice(need).to_batches()
            have -= need
