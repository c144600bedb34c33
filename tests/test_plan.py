"""The plan: order, duplicates, balance, and that it depends on the rows alone."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from hubbeam.modules.errors import ConfigError
from hubbeam.transforms import files
from hubbeam.transforms.listing import LISTING, list_images
from hubbeam.transforms.plan import (
    count_shards,
    read_plan_shard,
    shard_name,
    write_plan,
)

Row = tuple[str, int | None, int | None, str | None, str | None]


def listing(rows: list[Row], size: int = 1000) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(rows), size):
        columns = zip(*rows[start : start + size], strict=True)
        yield pa.record_batch(
            [pa.array(c, f.type) for c, f in zip(columns, LISTING, strict=True)], schema=LISTING
        )


def plan(rows: list[Row], folder: Path | str, **options: Any) -> list[pa.Table]:
    summary = write_plan(listing(rows), str(folder), **options)
    return [read_plan_shard(str(folder), i, summary.shards) for i in range(summary.shards)]


def uris(tables: list[pa.Table]) -> list[str]:
    return [uri for table in tables for uri in table.column("uri").to_pylist()]


NAMES = [
    "/b",
    "/a/z",
    "/a b",
    "/a\nb",
    "/ä",
    "/日本",
    "/😀",
    "/\ufeff",
    "/A",
    "/a#",
    "/a",
    "/a[1]",
    "/~",
]


def test_sorted_by_bytes_of_the_uri(tmp_path: Path) -> None:
    tables = plan([(name, 1, 2, None, None) for name in NAMES], tmp_path, shards=3)
    assert uris(tables) == sorted(NAMES, key=lambda name: name.encode())
    assert all(table.schema == LISTING for table in tables)


@pytest.mark.parametrize(("count", "shards"), [(10, 3), (7, 7), (5, 8), (1, 1), (70_001, 9)])
def test_balanced_to_one(tmp_path: Path, count: int, shards: int) -> None:
    rows: list[Row] = [(f"/{i:06d}", i, i, None, None) for i in range(count)]
    tables = plan(rows, tmp_path, shards=shards)
    sizes = [len(table) for table in tables]
    assert len(tables) == min(shards, count)
    assert max(sizes) - min(sizes) <= 1
    assert uris(tables) == [row[0] for row in rows]
    assert [n for table in tables for n in table.column("size_bytes").to_pylist()] == list(
        range(count)
    )


def test_summary_and_duplicates(tmp_path: Path) -> None:
    rows: list[Row] = [
        ("/a", None, None, None, None),
        ("/a", 5, 1_000_001, None, None),
        ("/a", None, None, "not_found", "gone"),
        ("/b", None, None, "not_found", "gone"),
        ("/b/", None, None, "permission_denied", "may not"),
        ("/c", 7, 3, None, None),
        ("/c", 7, 3, None, None),
        ("/d", None, None, "not_found", "gone"),
    ]
    summary = write_plan(listing(rows), str(tmp_path))
    table = read_plan_shard(str(tmp_path), 0, 1)
    assert uris([table]) == ["/a", "/b", "/b/", "/c", "/d"]
    assert table.slice(0, 1).to_pylist()[0]["size_bytes"] == 5
    assert table.column("modified").cast(pa.int64()).to_pylist()[0] == 1_000_001
    assert table.column("reason").to_pylist()[1:3] == ["not_found", "permission_denied"]
    assert (summary.images, summary.duplicates, summary.size_bytes) == (5, 3, 12)
    assert (summary.shards, summary.list_rejects) == (1, {"not_found": 2, "permission_denied": 1})


def test_same_rows_in_another_order_give_the_same_plan(tmp_path: Path) -> None:
    chance = random.Random(1)
    rows: list[Row] = [
        (
            f"/{chance.randrange(20_000)}",
            chance.choice([None, 1, 2]),
            chance.choice([None, 3]),
            None,
            None,
        )
        for _ in range(30_000)
    ] + [
        (f"/{i}", None, None, chance.choice(["empty", "not_found"]), "x")
        for i in range(0, 30_000, 3)
    ]
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        plan(rows, folder, images_per_shard=4000)
        chance.shuffle(rows)
    contents = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1]
    assert len(contents[0]) == 6


def test_nothing_is_written_when_the_listing_fails(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    inputs = [str(tmp_path / "a.jpg"), str(tmp_path / "*.nix")]
    with pytest.raises(ConfigError, match="nix"):
        write_plan(list_images(inputs), str(tmp_path / "plan"))
    assert not (tmp_path / "plan").exists()


def test_empty_listing(tmp_path: Path) -> None:
    summary = write_plan(iter([]), str(tmp_path))
    assert (summary.images, summary.shards, summary.list_rejects) == (0, 0, {})


@pytest.mark.parametrize(
    ("images", "options", "shards"),
    [
        (0, {}, 0),
        (1, {}, 1),
        (255, {}, 1),
        (511, {"workers": 8}, 1),
        (512, {"workers": 8}, 2),
        (8192, {}, 1),
        (8192, {"workers": 2}, 8),
        (8192, {"workers": 100}, 32),
        (1_000_000, {}, 123),
        (1_000_000, {"workers": 100}, 400),
        (10_000_000, {}, 1221),
        (100, {"images_per_shard": 30}, 4),
        (100, {"images_per_shard": 1}, 100),
        (100, {"shards": 7}, 7),
        (100, {"shards": 200}, 100),
    ],
)
def test_count_shards(images: int, options: dict[str, int], shards: int) -> None:
    assert count_shards(images, **options) == shards


@pytest.mark.parametrize(
    "options",
    [{"shards": 0}, {"images_per_shard": 0}, {"shards": 1, "images_per_shard": 1}],
)
def test_bad_sizes(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"--shards|--images-per-shard"):
        write_plan(listing([("/a", 1, 1, None, None)]), str(tmp_path), **options)


def test_on_gcs(gcs_bucket: str) -> None:
    rows: list[Row] = [(name, 1, 2, None, None) for name in NAMES]
    folder = f"{gcs_bucket}/out [1]/plan"
    tables = plan(rows, folder, shards=3)
    assert uris(tables) == sorted(NAMES, key=lambda name: name.encode())
    assert sorted(files.list_names(folder)) == [shard_name(i, 3) for i in range(3)]
