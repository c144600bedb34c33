"""One shard from its plan rows alone: read, decode, embed, write, each while the others do.

A shard is computed by one call and writes its own files, so it may run twice, even at the same
time, and a finished one is never computed again.
"""

import hashlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.metrics import Metrics
from apache_beam.transforms.window import GlobalWindows
from apache_beam.utils.windowed_value import WindowedValue

from hubbeam.modules.engines.base import Engine
from hubbeam.modules.errors import ImageError, RunError
from hubbeam.transforms import files
from hubbeam.transforms.decode import decode_batch
from hubbeam.transforms.embed import embed_batch
from hubbeam.transforms.job import ExtractJob
from hubbeam.transforms.plan import read_plan_shard
from hubbeam.transforms.process import Process, this_process
from hubbeam.transforms.progress import note_progress
from hubbeam.transforms.read import ASSUMED_BYTES, is_cached, read_batch
from hubbeam.transforms.verify import verify_shard
from hubbeam.transforms.write import (
    PICTURE_FIELDS,
    REJECTS,
    open_shard,
    vectors_batch,
    write_rejects,
)

IMAGES_AT_ONCE = 32
"""Most images that a thread decodes and embeds in one go. Measured: the fewer, the more often the
decoder and the module push each other out of the cache; 16 cost 3 %, and 4 a tenth."""

BATCHES_TO_END = 8
"""Towards the end of a shard batches grow smaller, one takes this part of what is left, so that all
threads end together (guided self-scheduling, Polychronopoulos and Kuck 1987)."""

_FEW = 4
"""Fewer in a batch are not worth their handling."""

BYTES_AT_ONCE = 4 << 20
"""Bytes of image files after which a batch is cut: large pictures are not kept waiting for many."""

BATCHES_AHEAD = 4
"""Batches for each core that are read, computed or waiting to be written. Where the storage is
remote, as many as there are threads to wait for it."""


@dataclass
class BatchResult:
    """What came of one batch of a shard.

    Attributes:
      batches: vectors of each module, as `vectors_batch` makes them.
      rejects: rows of `REJECTS`.
      images: images of the batch.
      size_bytes: bytes read.
      milliseconds: time spent in each stage.
    """

    batches: list[pa.RecordBatch]
    rejects: list[dict[str, Any]]
    images: int
    size_bytes: int = 0
    milliseconds: dict[str, int] = field(default_factory=dict)


def extract_shard(
    job: ExtractJob, shard: int, process: Process, end: Callable[[Callable[[], None]], object]
) -> Iterator[BatchResult]:
    """Computes a shard and writes its files; they appear whole, the vectors last.

    Args:
      job: the run.
      shard: index of the shard.
      process: what this process shares.
      end: is given, after the last batch, what ends the files and makes them appear.

    Yields:
      Each batch, after it was given to the writer.
    """
    plan = read_plan_shard(job.plan, shard, job.shards)
    rejects = _list_rejects(plan)
    loading = [
        process.load(module, choice, job.store)
        for module, choice in zip(job.modules, job.engines, strict=True)
    ]
    engines = [engine.result() for engine in loading]
    with ExitStack() as stack:
        writers = stack.enter_context(open_shard(job, shard, engines))
        for result in compute_batches(job, _without_list_rejects(plan), engines, process):
            for writer, batch in zip(writers, result.batches, strict=True):
                writer.write(batch)
            rejects += result.rejects
            yield result
        opened = stack.pop_all()

    def finish() -> None:
        with opened:
            # Before the vectors appear, for those tell a later run that the shard is finished.
            write_rejects(job, shard, pa.Table.from_pylist(rejects, REJECTS))

    end(finish)


def _list_rejects(plan: pa.Table) -> list[dict[str, Any]]:
    listed = plan.filter(pa.compute.is_valid(plan["reason"])).select(["uri", "reason", "message"])
    return [{**row, "stage": "list"} for row in listed.to_pylist()]


def _without_list_rejects(plan: pa.Table) -> pa.Table:
    return plan.filter(pa.compute.is_null(plan["reason"])).combine_chunks()


def compute_batches(
    job: ExtractJob, plan: pa.Table, engines: Sequence[Engine], process: Process
) -> Iterator[BatchResult]:
    """Reads, decodes and embeds the images of a plan, in order, batches side by side.

    Which images share a batch depends on the plan alone, not on the speed of anything.

    Args:
      job: the run.
      plan: rows of the plan, without those that listing rejected.
      engines: what runs each of ``job.modules``.
      process: gives threads and the budget of bytes.

    Yields:
      One result a batch, in the plan's order.
    """
    if not plan.num_rows:
        return
    max_bytes = job.planned.meaning.limits.max_bytes
    sizes = [
        min(ASSUMED_BYTES if size is None else size, max_bytes)
        for size in plan["size_bytes"].to_pylist()
    ]
    local = files.is_local(plan["uri"][0].as_py())
    most_ahead = BATCHES_AHEAD * process.threads if local else process.reads
    ahead: deque[Future[BatchResult]] = deque()
    try:
        step = max(engine.batch_size for engine in engines)
        for start, stop in cut_batches(sizes, min(job.batch_size, IMAGES_AT_ONCE), step):
            if len(ahead) >= most_ahead:
                yield ahead.popleft().result()
            rows = plan.slice(start, stop - start)
            ahead.append(_start_batch(job, rows, sum(sizes[start:stop]), engines, process))
        while ahead:
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()


def cut_batches(sizes: Sequence[int], most: int, step: int) -> Iterator[tuple[int, int]]:
    """Cuts a row of images into batches, bounded by count and by bytes.

    Args:
      sizes: bytes of each image.
      most: images in a batch, at most.
      step: images that an engine takes at once; a batch is cut for its bytes after a multiple,
        unless it grows very large.

    Yields:
      Start and stop of each batch, in order.
    """
    start = held = 0
    for stop, size in enumerate(sizes, 1):
        held += size
        count = stop - start
        aligned = count % min(step, most) == 0
        ending = aligned and count >= max(_FEW, (len(sizes) - start) / BATCHES_TO_END)
        if count == most or ending or held >= (BYTES_AT_ONCE if aligned else 8 * BYTES_AT_ONCE):
            yield start, stop
            start, held = stop, 0
    if start < len(sizes):
        yield start, len(sizes)


def _start_batch(
    job: ExtractJob, rows: pa.Table, size_bytes: int, engines: Sequence[Engine], process: Process
) -> "Future[BatchResult]":
    limits = job.planned.meaning.limits
    uris = rows["uri"].to_pylist()
    process.reading.acquire(size_bytes)
    held = size_bytes
    done: Future[BatchResult] = Future()

    def fail(error: BaseException) -> None:
        process.reading.release(held)
        done.set_exception(error)

    def read(and_then: Callable[[list[bytes | ImageError], int], object]) -> None:
        nonlocal held
        if not done.set_running_or_notify_cancel():
            process.reading.release(held)
            return
        try:
            started = time.monotonic()
            contents = read_batch(uris, limits)
            read_bytes = sum(len(data) for data in contents if not isinstance(data, ImageError))
            process.reading.correct(read_bytes - held)
            held = read_bytes
            and_then(contents, int(1000 * (time.monotonic() - started)))
        except BaseException as error:
            fail(error)

    def compute(contents: list[bytes | ImageError], milliseconds: int) -> None:
        try:
            result = compute_batch(job, rows, contents, engines, process)
        except BaseException as error:
            fail(error)
            return
        process.reading.release(held)
        result.size_bytes = held
        result.milliseconds["read"] = milliseconds
        done.set_result(result)

    if all(map(is_cached, uris)):
        # What is read by the thread that decodes it is still in the core's cache: 1 % for large
        # pictures. Only what need not be waited for, or the core would be idle.
        process.compute.submit(read, compute)
    else:
        process.readers.submit(read, lambda *contents: process.compute.submit(compute, *contents))
    return done


def compute_batch(
    job: ExtractJob,
    rows: pa.Table,
    contents: list[bytes | ImageError],
    engines: Sequence[Engine],
    process: Process,
) -> BatchResult:
    """Decodes a batch once and runs every module on it.

    Args:
      job: the run.
      rows: rows of the plan.
      contents: bytes of each row's file, or why it could not be read.
      engines: what runs each of ``job.modules``.
      process: keeps the decoding of large pictures within its memory.

    Returns:
      The vectors of each module and the rejects.
    """
    meaning = job.planned.meaning
    clock = [time.monotonic()]
    uris: list[str] = rows["uri"].to_pylist()
    hashes = [
        None if isinstance(data, ImageError) else hashlib.sha256(data).hexdigest()
        for data in contents
    ]
    sizes = sorted({module.image_size for module in job.modules})
    decoded = decode_batch(
        contents, meaning.preset, sizes, meaning.limits, process.decoding.reserve
    )
    clock.append(time.monotonic())

    rejects: list[dict[str, Any]] = []

    def reject(position: int, stage: str, error: ImageError, module: str | None = None) -> None:
        rejects.append(
            {
                "uri": uris[position],
                "stage": stage,
                "reason": error.reason,
                "message": error.message,
                "sha256": hashes[position],
                "module": module,
            }
        )

    for position, data in enumerate(contents):
        if isinstance(data, ImageError):
            reject(position, "read", data)
        elif position in decoded.errors:
            reject(position, "decode", decoded.errors[position])

    kept = pa.array(decoded.positions)
    pictures = pa.RecordBatch.from_arrays(
        [
            rows["uri"].take(kept).combine_chunks(),
            pa.array([hashes[i] for i in decoded.positions], pa.string()),
            pa.array([len(contents[i]) for i in decoded.positions], pa.int64()),
            rows["modified"].take(kept).combine_chunks(),
            pa.array([picture.width for picture in decoded.pictures], pa.int32()),
            pa.array([picture.height for picture in decoded.pictures], pa.int32()),
            pa.array([picture.format for picture in decoded.pictures], pa.string()),
        ],
        schema=pa.schema(PICTURE_FIELDS),
    )
    batches = []
    for module, engine in zip(job.modules, engines, strict=True):
        vectors, errors = embed_batch(engine, decoded.pixels[module.image_size], module.width)
        for row, error in sorted(errors.items()):
            reject(int(decoded.positions[row]), "embed", error, module.name)
        good = [row for row in range(len(vectors)) if row not in errors]
        if errors:
            batches.append(vectors_batch(pictures.take(pa.array(good, pa.int64())), vectors[good]))
        else:
            batches.append(vectors_batch(pictures, vectors))
    clock.append(time.monotonic())
    return BatchResult(
        batches,
        rejects,
        len(contents),
        milliseconds={
            "decode": int(1000 * (clock[1] - clock[0])),
            "embed": int(1000 * (clock[2] - clock[1])),
        },
    )


@beam.typehints.with_input_types(tuple[int, Iterable[None]])
@beam.typehints.with_output_types(tuple[int, bool])
class _ExtractShardFn(beam.DoFn):
    """(shard index, -) -> (shard index, whether an earlier run had finished it)."""

    def __init__(self, job: ExtractJob):
        self._job = job

    def setup(self) -> None:
        self._process = this_process(self._job.processes)
        self._counters: dict[str, Any] = {}

    def _count(self, name: str, value: int) -> None:
        if name not in self._counters:
            self._counters[name] = Metrics.counter("hubbeam", name)
        self._counters[name].inc(value)

    def start_bundle(self) -> None:
        self._ending: deque[tuple[int, Future[None]]] = deque()

    def process(self, element: tuple[int, Iterable[None]]) -> Iterator[tuple[int, bool]]:
        job, (shard, _) = self._job, element
        if self._is_finished(shard):
            self._count("shards_kept", 1)
            yield shard, True
            return

        def end(finish: Callable[[], None]) -> None:
            self._ending.append((shard, self._process.readers.submit(finish)))

        images = rejected = 0
        for result in extract_shard(job, shard, self._process, end):
            images += result.images
            rejected += len({row["uri"] for row in result.rejects})
            self._measure(result)
            note_progress(job.progress, shard, images, rejected)
        # While one is ended, which for remote storage means uploaded, the next is computed.
        yield from self._ended(leave=1)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        for ended in self._ended(leave=0):
            yield GlobalWindows.windowed_value(ended)

    def _ended(self, leave: int) -> Iterator[tuple[int, bool]]:
        while len(self._ending) > leave:
            shard, ending = self._ending.popleft()
            ending.result()
            self._count("shards_written", 1)
            yield shard, False

    def _is_finished(self, shard: int) -> bool:
        try:
            report = verify_shard(self._job, shard)
        except RunError:
            return False
        note_progress(self._job.progress, shard, report.images, report.rejected_images)
        return True

    def _measure(self, result: BatchResult) -> None:
        self._count("bytes_read", result.size_bytes)
        for module, batch in zip(self._job.modules, result.batches, strict=True):
            self._count(f"vectors_{module.name}", batch.num_rows)
        for reason, count in Counter(row["reason"] for row in result.rejects).items():
            self._count(f"rejects_{reason}", count)
        for stage, milliseconds in result.milliseconds.items():
            Metrics.distribution("hubbeam", f"{stage}_batch_msecs").update(milliseconds)


class ExtractShards(beam.PTransform):
    """(Shard index, None) in; each shard's files written, and (index, kept) out.

    Grouping by distinct keys spreads the shards as a Reshuffle would, but is one transform and not
    eight: the pipeline is built and started in half the time.
    """

    def __init__(self, job: ExtractJob):
        super().__init__()
        self._job = job

    def expand(
        self, shards: beam.PCollection[tuple[int, None]]
    ) -> beam.PCollection[tuple[int, bool]]:
        return (
            shards
            | "Spread" >> beam.GroupByKey()
            | "ExtractShard" >> beam.ParDo(_ExtractShardFn(self._job))
        )
