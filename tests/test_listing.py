"""Listing: what inputs and tables mean, odd names, and what cannot be read."""

import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.io.filesystem import FileMetadata, FileSystem

from hubbeam.modules.errors import ConfigError
from hubbeam.transforms import files
from hubbeam.transforms.listing import IMAGE_EXTENSIONS, LISTING, list_images

ODD_NAMES = ["a b.jpg", "x[1].jpg", "n#1.jpg", "q?.jpg", "100%25.jpg", "日本 ü.jpg", "st*r.jpg"]


def rows(*inputs: str | Path, **options: Any) -> list[dict[str, Any]]:
    batches = list(list_images([str(name) for name in inputs], **options))
    assert all(batch.schema == LISTING for batch in batches)
    return sorted(
        (row for batch in batches for row in batch.to_pylist()), key=lambda row: str(row["uri"])
    )


def names(base: str | Path, *inputs: str, **options: Any) -> list[str]:
    """The names, below `base`, of what is listed; rejects end in their reason."""
    found = rows(*[f"{base}/{name}" if name else str(base) for name in inputs], **options)
    return [
        row["uri"].removeprefix(f"{base}/") + (f" {row['reason']}" if row["reason"] else "")
        for row in found
    ]


def touch(base: Path, *paths: str) -> Path:
    for path in paths:
        (base / path).parent.mkdir(parents=True, exist_ok=True)
        (base / path).write_bytes(path.encode())
    return base


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return touch(
        tmp_path, "a.jpg", "b/c.JPG", "b/d/e.png", "b/d/.h.webp", "b/t.txt", "b/jpg", "b2/f.jpg"
    )


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["a.jpg", "b/c.JPG", "b/d/.h.webp", "b/d/e.png", "b2/f.jpg"]),
        ("b", ["b/c.JPG", "b/d/.h.webp", "b/d/e.png"]),
        ("b/", ["b/c.JPG", "b/d/.h.webp", "b/d/e.png"]),
        ("b/t.txt", ["b/t.txt"]),
        ("*.jpg", ["a.jpg"]),
        ("**/*.jpg", ["a.jpg", "b2/f.jpg"]),
        ("**.jpg", ["a.jpg", "b2/f.jpg"]),
        ("*/*.[jJ]*", ["b/c.JPG", "b2/f.jpg"]),
        ("b/**", ["b/c.JPG", "b/d/.h.webp", "b/d/e.png", "b/jpg", "b/t.txt"]),
        ("b/**/e.png", ["b/d/e.png"]),
        ("**/d/*", ["b/d/.h.webp", "b/d/e.png"]),
        ("b?/*", ["b2/f.jpg"]),
        ("b[!3]/*.jpg", ["b2/f.jpg"]),
        ("b*/**/?.*", ["b/c.JPG", "b/d/e.png", "b/t.txt", "b2/f.jpg"]),
        ("b/../a.jpg", ["a.jpg"]),
        ("b/../*/./f.jpg", ["b2/f.jpg"]),
    ],
)
def test_patterns(tree: Path, pattern: str, expected: list[str]) -> None:
    assert names(tree, pattern) == expected


def test_the_extensions_are_the_allowed_formats() -> None:
    formats = "jpg jpeg jpe jfif mpo png webp gif bmp tif tiff pnm ppm pgm pbm"
    assert frozenset(formats.split()) == IMAGE_EXTENSIONS


@pytest.mark.parametrize("extension", sorted(IMAGE_EXTENSIONS))
def test_extensions_of_folders(tmp_path: Path, extension: str) -> None:
    touch(tmp_path, f"a.{extension}", f"b.{extension.upper()}", f"{extension}", f"c.{extension}.gz")
    assert names(tmp_path, "") == [f"a.{extension}", f"b.{extension.upper()}"]


def test_size_and_time(tree: Path) -> None:
    os.utime(tree / "a.jpg", ns=(0, 1_700_000_000_123_456_789))
    (row,) = rows(tree / "a.jpg")
    when = datetime(2023, 11, 14, 22, 13, 20, 123456, tzinfo=timezone.utc)
    assert (row["size_bytes"], row["modified"]) == (5, when)


def test_one_file_by_two_spellings_is_one_uri(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree / "b")
    spellings = [
        "../a.jpg",
        "./../b/../a.jpg",
        f"{tree}//a.jpg",
        f"file://{tree}/a.jpg",
        f"/{tree}/a.jpg",
    ]
    assert {row["uri"] for row in rows(*spellings)} == {f"{tree}/a.jpg"}
    (tree / "link").symlink_to("b")
    assert names(tree, "link/c.JPG") == ["link/c.JPG"]


def test_odd_names_survive(tmp_path: Path) -> None:
    odd = [*ODD_NAMES, "new\nline.jpg", " lead.jpg", "tab\t.jpg", "back\\slash.jpg", "-x.jpg"]
    touch(tmp_path, *odd)
    assert sorted(names(tmp_path, "")) == sorted(odd)
    assert sorted(names(tmp_path, "*")) == sorted(odd)
    for name in odd:
        (row,) = rows(tmp_path / name)
        assert files.read_bytes(row["uri"]) == name.encode()
    assert names(tmp_path, "x[[]1].jpg") == ["x[1].jpg"]
    assert rows((tmp_path / "100%25.jpg").as_uri())[0]["uri"] == f"{tmp_path}/100%25.jpg"


def test_a_folder_with_brackets_is_meant_literally(tmp_path: Path) -> None:
    touch(tmp_path, "[ab]/x.jpg", "a/y.jpg")
    assert names(tmp_path, "[ab]") == ["[ab]/x.jpg"]
    assert names(tmp_path, "[ab]/*.jpg") == ["[ab]/x.jpg"]
    assert names(tmp_path, "[a-z]/*.jpg") == ["a/y.jpg"]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    base = os.fsencode(tmp_path)
    Path(os.fsdecode(base + b"/\xe9t\xe9")).mkdir()
    for name in (b"/\xff.jpg", b"/\xe9t\xe9/a.jpg"):
        Path(os.fsdecode(base + name)).touch()
    expected = ["\\xe9t\\xe9/a.jpg bad_name", "\\xff.jpg bad_name"]
    assert names(tmp_path, "") == expected
    assert names(tmp_path, "**") == expected
    assert rows(os.fsdecode(base + b"/\xff.jpg"))[0]["reason"] == "bad_name"


def test_what_is_not_a_file(tree: Path) -> None:
    os.mkfifo(tree / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tree / "socket.jpg"))
    (tree / "dead.jpg").symlink_to("nothing")
    (tree / "self.jpg").symlink_to("self.jpg")
    (tree / "good.jpg").symlink_to("b/c.JPG")
    expected = ["a.jpg", "b2/f.jpg", "dead.jpg not_found", "good.jpg", "self.jpg not_found"]
    assert names(tree, "**/*.jpg") == expected
    assert names(tree, "dead.jpg", "self.jpg") == ["dead.jpg not_found", "self.jpg not_found"]
    with pytest.raises(ConfigError, match=r"pipe\.jpg' is neither a file nor a folder"):
        rows(tree / "pipe.jpg")


def test_links_in_a_circle(tree: Path) -> None:
    before = names(tree, "")
    (tree / "b/d/up").symlink_to("..")
    (tree / "b/top").symlink_to(tree)
    (tree / "b/above").symlink_to(tree.parent)
    assert names(tree, "") == before
    (tree / "b2/other").symlink_to("../b/d")  # no circle: followed
    assert names(tree, "b2") == [
        "b2/f.jpg",
        "b2/other/.h.webp",
        "b2/other/e.png",
        "b2/other/up/c.JPG",
    ]


def test_links_to_each_other(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "a/to_b").symlink_to("../b")
    (tmp_path / "b/to_a").symlink_to("../a")
    assert names(tmp_path, "") == ["a/1.jpg", "a/to_b/2.jpg", "b/2.jpg", "b/to_a/1.jpg"]


@pytest.fixture
def open_tree() -> Iterator[Path]:
    """A tree that other users may read, unlike pytest's own temporary folders."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield touch(Path(folder), "a.jpg", "b/c.JPG", "b/d/e.png", "b2/f.jpg")


def test_what_may_not_be_read(open_tree: Path) -> None:
    tree = open_tree
    (tree / "b/d").chmod(0)
    (tree / "b2").chmod(0o444)  # its names can be read, its files cannot be looked up
    code = f"""
        import os, sys
        from hubbeam.transforms.listing import list_images
        if os.getuid() == 0:
            os.setgroups([]); os.setgid(65534); os.setuid(65534)
        try:
            os.listdir({str(tree)!r})
        except PermissionError:
            sys.exit(42)
        for batch in list_images([{str(tree)!r}]):
            for row in batch.to_pylist():
                print(row["uri"].removeprefix({str(tree)!r}), row["reason"])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    (tree / "b/d").chmod(0o755)
    (tree / "b2").chmod(0o755)
    if done.returncode == 42:
        pytest.skip("another user cannot reach the temporary folder")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        "/a.jpg None",
        "/b/c.JPG None",
        "/b/d/ permission_denied",
        "/b2/f.jpg permission_denied",
    ]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["*.nix", "a.jpg"], r"no image matches '.*\*\.nix'"),
        (["none.jpg"], r"there is no file or folder '.*none\.jpg'"),
        (["a.jpg/x"], "there is no file or folder"),
        (["empty"], "no image matches '.*empty'"),
        (["b/*/*/*/*"], "no image matches"),
        (["[z-a]"], "bad pattern"),
    ],
)
def test_no_match_is_an_error(tree: Path, inputs: list[str], message: str) -> None:
    (tree / "empty").mkdir()
    with pytest.raises(ConfigError, match=message):
        names(tree, *inputs)


def test_bad_usage() -> None:
    for inputs, options, message in [
        ([], {}, "nothing to read"),
        ([""], {}, "empty name"),
        (["a"], {"uri_column": "x"}, "--table"),
        (["file://elsewhere/a.jpg"], {}, "file of this machine"),
        (["weird://x/*.jpg"], {}, "cannot read weird://"),
        (["https://example.org/a.jpg"], {}, "cannot read https://"),
    ]:
        with pytest.raises(ConfigError, match=message):
            list_images(inputs, **options)


def test_missing_extra_says_what_to_install() -> None:
    # Just what happens without the extra: its packages cannot be imported.
    code = """
        import sys
        sys.modules["google.cloud.storage"] = None
        from hubbeam.transforms.listing import list_images
        try:
            list_images(["gs://bucket/*.jpg"])
        except Exception as e:
            print(type(e).__name__, e)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("ConfigError"), done.stderr
    assert "pip install 'hubbeam[gcp]'" in done.stdout


def test_many_files_in_many_folders(tmp_path: Path) -> None:
    for i in range(120):
        folder = tmp_path / f"{i % 7}" / f"{i}"
        folder.mkdir(parents=True)
        for k in range(100):
            (folder / f"{k}.jpg").touch()
    found = names(tmp_path, "")
    assert len(found) == len(set(found)) == 12_000
    batches = list_images([str(tmp_path)])
    assert len(next(batches)) <= 8192
    batches.close()  # type: ignore[attr-defined]  # threads end with the reader
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("list-")]


# --- tables ---------------------------------------------------------------------------------------


def table_of(path: Path, uris: list[str | None], **columns: list[Any]) -> str:
    pq.write_table(pa.table({"uri": pa.array(uris, pa.string()), **columns}), path)
    return str(path)


def test_parquet_table(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    uris = [
        "a.jpg",
        f"{tree}/b/t.txt",
        "gone.jpg",
        "gs://other/x y.jpg",
        "b",
        f"file://{tree}/a.jpg",
    ]
    table = table_of(tree / "t.parquet", [*uris], label=list(range(6)))
    found = rows(table=table)
    assert [
        (row["uri"].removeprefix(f"{tree}/"), row["size_bytes"], row["reason"]) for row in found
    ] == [
        ("a.jpg", 5, None),
        ("a.jpg", 5, None),
        ("b", None, "not_found"),
        ("b/t.txt", 7, None),
        ("gone.jpg", None, "not_found"),
        ("gs://other/x y.jpg", None, None),
    ]
    assert [row["modified"] is None for row in found] == [False, False, True, False, True, True]
    assert len(rows("b2", table=table)) == 7


def test_csv_table(tree: Path) -> None:
    path = tree / "t.csv"
    touch(tree, "with, comma.jpg", "two\nlines.jpg")
    path.write_text(
        f'id,path\n1,{tree}/a.jpg\n2,"{tree}/with, comma.jpg"\n3,"{tree}/two\nlines.jpg"\n'
    )
    expected = ["a.jpg", "two\nlines.jpg", "with, comma.jpg"]
    found = rows(table=str(path), uri_column="path")
    assert [row["uri"].removeprefix(f"{tree}/") for row in found] == expected
    with pytest.raises(ConfigError, match="no column 'uri': say --uri-column, one of id, path"):
        rows(table=str(path))
    with pytest.raises(ConfigError, match="no column 'x'; it has id, path"):
        rows(table=str(path), uri_column="x")
    path.write_text(f"image\n{tree}/a.jpg\n")
    assert [row["size_bytes"] for row in rows(table=str(path))] == [5]
    path.write_text(f"{tree}/a.jpg\n{tree}/b/c.JPG\n")
    with pytest.raises(ConfigError, match="no header"):
        rows(table=str(path))


def test_text_table(tree: Path) -> None:
    odd = touch(tree, "a b #[1],ü.jpg") / "a b #[1],ü.jpg"
    path = tree / "t.txt"
    path.write_bytes(
        b"\xef\xbb\xbf" + f"{tree}/a.jpg\r\n\n{odd}\n".encode() + os.fsencode(tree) + b"/\xff.jpg"
    )
    found = {row["uri"].removeprefix(f"{tree}/"): row["reason"] for row in rows(table=str(path))}
    assert found == {"a.jpg": None, odd.name: None, "\\xff.jpg": "bad_name"}
    with pytest.raises(ConfigError, match="one uri a line"):
        rows(table=str(path), uri_column="uri")


def test_long_table(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table_of(path, [f"gs://bucket/{i}.jpg" for i in range(50_000)])
    batches = list(list_images([], table=str(path)))
    assert sum(map(len, batches)) == 50_000
    assert max(map(len, batches)) <= 8192


@pytest.mark.parametrize(
    ("uris", "message"),
    [
        (["a.jpg", None], "row 2 has no uri"),
        (["", "a.jpg"], "row 1 has no uri"),
        (["x"] * 9000 + [" "], "row 9001 has no uri"),
        (["a.jpg", "weird://x"], "row 2: cannot read weird://"),
        ([], "names no image"),
    ],
)
def test_bad_rows(tmp_path: Path, uris: list[str | None], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rows(table=table_of(tmp_path / "t.parquet", uris))


def test_bad_tables(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.parquet"
    pq.write_table(pa.table({"uri": [1, 2]}), numbers)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    (tmp_path / "t.csv.gz").write_bytes(b"\x1f\x8b\x08\x00")
    for name, message in [
        ("numbers.parquet", "int64, not text"),
        ("broken.parquet", "cannot read the table"),
        ("t.csv.gz", "unpack it"),
        ("none.csv", "cannot read the table"),
        ("", "cannot read the table"),
    ]:
        with pytest.raises(ConfigError, match=message):
            list_images([], table=f"{tmp_path}/{name}")


# --- object stores --------------------------------------------------------------------------------


@pytest.fixture
def bucket(gcs_bucket: str) -> Iterator[str]:
    for name in [
        *ODD_NAMES,
        "d/e/f.PNG",
        "d/g.jpg",
        "d//h.jpg",
        "d/t.txt",
        "d2/i.jpg",
        "[k]/j.jpg",
    ]:
        files.write_bytes(f"{gcs_bucket}/{name}", name.encode())
    yield gcs_bucket


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", [*ODD_NAMES, "[k]/j.jpg", "d/e/f.PNG", "d/g.jpg", "d//h.jpg", "d2/i.jpg"]),
        ("d", ["d/e/f.PNG", "d/g.jpg", "d//h.jpg"]),
        ("d/", ["d/e/f.PNG", "d/g.jpg", "d//h.jpg"]),
        ("d/t.txt", ["d/t.txt"]),
        ("*.jpg", ODD_NAMES),
        ("d*/*.jpg", ["d/g.jpg", "d2/i.jpg"]),
        ("d/**", ["d/e/f.PNG", "d/g.jpg", "d//h.jpg", "d/t.txt"]),
        ("**/?.*", ["[k]/j.jpg", "d/e/f.PNG", "d/g.jpg", "d//h.jpg", "d/t.txt", "d2/i.jpg"]),
        ("x[1].jpg", ["x[1].jpg"]),
        ("q?.jpg", ["q?.jpg"]),
        ("n#1.jpg", ["n#1.jpg"]),
        ("[xn]*", ["x[1].jpg", "n#1.jpg"]),
        ("[k]", ["[k]/j.jpg"]),
        ("[[]k]/*", ["[k]/j.jpg"]),
    ],
)
def test_gcs(bucket: str, pattern: str, expected: list[str]) -> None:
    assert names(bucket, pattern) == sorted(expected)


def test_gcs_sizes_times_and_contents(bucket: str) -> None:
    before = datetime.now(timezone.utc).timestamp()
    for row in rows(bucket):
        name = row["uri"].removeprefix(f"{bucket}/")
        assert row["size_bytes"] == len(name.encode())
        assert abs(before - row["modified"].timestamp()) < 600
        assert files.read_bytes(row["uri"]) == name.encode()


def test_gcs_many_folders(gcs_bucket: str) -> None:
    """More folders than ranges are read side by side: each name is given once."""
    expected = [f"p/{i:02d}/x.jpg" for i in range(40)]
    for name in expected:
        files.write_bytes(f"{gcs_bucket}/{name}", b"x")
    assert names(gcs_bucket, "") == expected
    assert names(gcs_bucket, "p/3*/x.jpg") == expected[30:]


def test_gcs_errors(bucket: str) -> None:
    for uri, message in [
        (f"{bucket}/none.jpg", "no image matches"),
        (f"{bucket}/*.nix", r"no image matches '.*\*\.nix'"),
        ("gs://no-such-bucket/x", "gs://no-such-bucket/x"),
        ("gs:///x", "names no bucket"),
    ]:
        with pytest.raises(ConfigError, match=message):
            rows(uri)


def test_gcs_table(bucket: str, tmp_path: Path) -> None:
    table_of(tmp_path / "t.parquet", [f"{bucket}/d/g.jpg"])
    files.write_bytes(f"{bucket}/t.parquet", (tmp_path / "t.parquet").read_bytes())
    files.write_bytes(f"{bucket}/t.csv", f"uri\n{bucket}/d/g.jpg\n".encode())
    files.write_bytes(f"{bucket}/t.txt", f"{bucket}/d/g.jpg\n".encode())
    for name in ("t.parquet", "t.csv", "t.txt"):
        assert [row["uri"] for row in rows(table=f"{bucket}/{name}")] == [f"{bucket}/d/g.jpg"]


class _Shelf(FileSystem):
    """A store of Beam's plug-in interface that is none of those we know: names and sizes."""

    objects: ClassVar[dict[str, int]] = {}

    @classmethod
    def scheme(cls) -> str:
        return "shelf"

    def has_dirs(self) -> bool:
        return False

    def exists(self, path: str) -> bool:
        return path in self.objects

    def metadata(self, path: str) -> FileMetadata:
        return FileMetadata(path, self.objects[path], 1.5)

    def _list(self, dir_or_prefix: str) -> Iterator[FileMetadata]:
        if dir_or_prefix.startswith("shelf://broken"):
            raise OSError("out of order")
        for path in self.objects:
            if path.startswith(dir_or_prefix):
                yield self.metadata(path)

    def _none(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    join = split = mkdirs = create = open = copy = rename = delete = size = last_updated = _none
    checksum = _none


class _Tree(_Shelf):
    @classmethod
    def scheme(cls) -> str:
        return "tree"

    def has_dirs(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", [*ODD_NAMES, "[d]/e/f.jpg", "[d]/g.PNG"]),
        ("[d]", ["[d]/e/f.jpg", "[d]/g.PNG"]),
        ("*.jpg", ODD_NAMES),
        ("**/f.jpg", ["[d]/e/f.jpg"]),
        ("q?.jpg", ["q?.jpg"]),
        ("[[]d]/*", ["[d]/g.PNG", "[d]/t.txt"]),
    ],
)
def test_other_object_stores(pattern: str, expected: list[str]) -> None:
    stored = [*ODD_NAMES, "[d]/e/f.jpg", "[d]/g.PNG", "[d]/t.txt"]
    _Shelf.objects = {f"shelf://box/{name}": len(name) for name in stored}
    assert names("shelf://box", pattern) == sorted(expected)
    (row,) = rows("shelf://box/[d]/t.txt")
    assert (row["size_bytes"], row["modified"].timestamp()) == (9, 1.5)
    with pytest.raises(ConfigError, match="no image matches"):
        rows("shelf://box/none.jpg")
    with pytest.raises(ConfigError, match=r"cannot list 'shelf://broken/\*'.*out of order"):
        rows("shelf://broken/*")
    with pytest.raises(ConfigError, match="name its files in a --table"):
        rows("tree://box")
