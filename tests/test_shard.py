"""How a shard is cut into batches, and that nothing hangs or is lost when something fails."""

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hubbeam.modules.errors import ImageError
from hubbeam.modules.images import Limits
from hubbeam.modules.store import Store
from hubbeam.pipelines import extract
from hubbeam.pipelines.options import ExtractOptions
from hubbeam.pipelines.runners import Runner
from hubbeam.transforms import shard
from hubbeam.transforms.job import ExtractJob
from hubbeam.transforms.plan import read_plan_shard
from hubbeam.transforms.process import this_process
from hubbeam.transforms.read import ByteBudget, is_cached, read_batch, read_image
from hubbeam.transforms.shard import BYTES_AT_ONCE, compute_batches, cut_batches, extract_shard

MODULE = "mobilenet_v2_050_224"
BIG = BYTES_AT_ONCE


@pytest.mark.parametrize(
    ("sizes", "most", "step", "batches"),
    [
        ([], 16, 2, []),
        ([1] * 5, 2, 1, [(0, 2), (2, 4), (4, 5)]),
        ([BIG] * 5, 16, 1, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),
        ([BIG] * 5, 16, 2, [(0, 2), (2, 4), (4, 5)]),
        ([BIG] * 5, 3, 4, [(0, 3), (3, 5)]),
        ([9 * BIG] * 3, 16, 4, [(0, 1), (1, 2), (2, 3)]),
        ([1, BIG, 1, 1, 1], 16, 1, [(0, 2), (2, 5)]),
        ([1] * 9, 16, 2, [(0, 4), (4, 8), (8, 9)]),
        ([1] * 50, 16, 1, [(0, 7), (7, 13), (13, 18), *((i, i + 4) for i in range(18, 50, 4))]),
        ([1] * 50, 16, 8, [(0, 8), (8, 16), (16, 24), (24, 32), (32, 40), (40, 48), (48, 50)]),
    ],
)
def test_batches_are_bounded_by_count_and_bytes(
    sizes: list[int], most: int, step: int, batches: list[tuple[int, int]]
) -> None:
    assert list(cut_batches(sizes, most, step)) == batches


@pytest.fixture(scope="module")
def job(store: Store, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> ExtractJob:
    """A planned run over the labelled photographs, in one shard, nothing computed."""
    output = str(tmp_path_factory.mktemp("job"))
    options = ExtractOptions(
        inputs=(str(shared / "images" / "labelled"),),
        modules=(MODULE,),
        output=output,
        store=store.root,
    )
    runner = Runner.from_options(options, [])
    meaning = extract.resolve(options, runner)
    return ExtractJob(
        output=output,
        planned=extract._plan_in(output, meaning, options, False, runner),
        engines=extract._choose_engines(meaning, options, runner),
        store=store.root,
    )


class Dying:
    """An engine that takes the process down with it, as a lack of memory does."""

    name, version, streams, batch_size = "dying", "1", 1, 1

    def run(self, pixels: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt


def test_what_kills_a_batch_ends_the_shard(job: ExtractJob) -> None:
    process = this_process()
    plan = read_plan_shard(job.plan, 0, 1)
    engine: Any = Dying()
    with pytest.raises(KeyboardInterrupt):
        list(compute_batches(job, plan, [engine], process))
    process.reading.acquire(1 << 40)  # all bytes were given back: this does not wait
    process.reading.release(1 << 40)


def test_an_abandoned_shard_leaves_nothing(job: ExtractJob) -> None:
    process = this_process()
    running = extract_shard(job, 0, process, lambda finish: finish())
    next(running)
    running.close()
    process.reading.acquire(1 << 40)
    process.reading.release(1 << 40)
    assert not list(Path(job.output).glob(f"{MODULE}/*")) + list(Path(job.output).glob("*/.*.tmp"))


@pytest.mark.parametrize("cached", [True, False])
def test_files_in_memory_are_read_without_a_change_of_threads(
    job: ExtractJob, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    process = this_process()
    threads: set[str] = set()

    def read(uris: list[str], limits: Limits) -> list[bytes | ImageError]:
        threads.add(threading.current_thread().name.rpartition("_")[0])
        return read_batch(uris, limits)

    monkeypatch.setattr(shard, "is_cached", lambda uri: cached)
    monkeypatch.setattr(shard, "read_batch", read)
    plan = read_plan_shard(job.plan, 0, 1)
    engine = process.engine(job.modules[0], job.engines[0], job.store)
    results = list(compute_batches(job, plan, [engine], process))
    assert threads == {"hubbeam-compute" if cached else "hubbeam-read"}
    uris = [uri for result in results for uri in result.batches[0]["uri"].to_pylist()]
    assert uris == plan["uri"].to_pylist()


def test_is_cached(tmp_path: Path) -> None:
    image = tmp_path / "image.jpg"
    image.write_bytes(b"x" * 10_000)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "empty.jpg").touch()
    for name in ("pipe.jpg", "empty.jpg", "gone.jpg", ".", "a\0b"):
        assert not is_cached(f"{tmp_path}/{name}")
    assert not is_cached("gs://bucket/image.jpg")
    with image.open("rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except (OSError, AttributeError):
            pytest.skip("this system or filesystem cannot tell")
    assert is_cached(str(image))


def test_budget_gives_the_whole_to_one_at_a_time() -> None:
    budget = ByteBudget(10)
    with budget.reserve(100):
        pass
    with budget.reserve(4), budget.reserve(6):
        pass


def test_pipes_and_folders_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, reason in (
        ("pipe.jpg", "unsupported_format"),
        ("", "unsupported_format"),
        ("gone.jpg", "not_found"),
        ("gone/x.jpg", "not_found"),
    ):
        with pytest.raises(ImageError) as error:
            read_image(str(tmp_path / name), Limits())
        assert error.value.reason == reason
    (tmp_path / "large.jpg").write_bytes(b"x" * 11)
    with pytest.raises(ImageError) as error:
        read_image(str(tmp_path / "large.jpg"), Limits(max_bytes=10))
    assert error.value.reason == "too_large"
    assert read_image(str(tmp_path / "large.jpg"), Limits(max_bytes=11)) == b"x" * 11
