"""Whole files: there entirely or not at all, on disk and on an object store."""

from pathlib import Path

import pytest

from hubbeam.transforms import files


@pytest.fixture(params=["local", "gcs"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path)
    return str(request.getfixturevalue("gcs_bucket"))


@pytest.mark.parametrize("name", ["a b.bin", "x[1]*?.bin", "n#1.bin", "d/100%25 ü.bin"])
def test_round_trip(base: str, name: str) -> None:
    path = files.join(base, "out", name)
    assert not files.exists(path)
    files.delete(path)  # not there: nothing happens
    files.write_bytes(path, b"one")
    files.write_bytes(path, b"two")
    assert files.exists(path)
    assert files.read_bytes(path) == b"two"
    folder = path.rpartition("/")[0]
    neighbour = files.join(folder, "x[1]AB.bin")
    files.write_bytes(neighbour, b"three")
    assert files.list_names(folder) == sorted([path.rpartition("/")[2], "x[1]AB.bin"])
    files.delete(path)
    assert files.list_names(folder) == ["x[1]AB.bin"]


def test_large(base: str) -> None:
    data = bytes(range(256)) * 80_000  # more than one part of an upload
    path = files.join(base, "large.bin")
    with files.write_whole(path) as file:
        for start in range(0, len(data), 3_000_000):
            file.write(data[start : start + 3_000_000])
    with files.open_read(path) as file:
        assert file.read(10) == data[:10]
        file.seek(-5, 2)
        assert file.read() == data[-5:]
    assert files.read_bytes(path) == data


@pytest.mark.parametrize("size", [10, 20_000_000])
def test_a_failure_while_writing_leaves_nothing(base: str, size: int) -> None:
    path = files.join(base, "out", "x.bin")
    with pytest.raises(RuntimeError, match="broken"), files.write_whole(path) as file:
        file.write(bytes(size))
        raise RuntimeError("broken")
    assert not files.exists(path)
    assert files.list_names(files.join(base, "out")) == []


def test_a_failure_while_writing_keeps_the_old_file(base: str) -> None:
    path = files.join(base, "x.bin")
    files.write_bytes(path, b"old")
    with pytest.raises(RuntimeError, match="broken"), files.write_whole(path) as file:
        file.write(b"new")
        raise RuntimeError("broken")
    assert files.read_bytes(path) == b"old"
    assert files.list_names(base) == ["x.bin"]


@pytest.mark.parametrize("size", [10, 20_000_000])
def test_a_failed_upload_leaves_nothing(gcs_bucket: str, size: int) -> None:
    path = f"{gcs_bucket}/x.refused"  # the emulator refuses such uploads
    with pytest.raises(Exception, match="403"):
        files.write_bytes(path, bytes(size))
    assert not files.exists(path)
    assert files.list_names(gcs_bucket) == []


def test_is_local() -> None:
    assert files.is_local("/a/b")
    assert files.is_local("a:b/#")
    assert not files.is_local("gs://bucket/a")
