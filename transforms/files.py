"""Files on any Beam filesystem: read whole, write whole or not at all."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems


def is_local(path: str) -> bool:
    """Tells whether `path` names a file of this machine (no ``scheme://``)."""
    return FileSystems.get_scheme(path) is None


def join(base: str, *parts: str) -> str:
    """Joins path parts the way the filesystem of `base` does."""
    return cast(str, FileSystems.join(base, *parts))


def open_read(path: str) -> BinaryIO:
    """Opens a file for reading bytes as they are stored (``.gz`` is not unpacked)."""
    if is_local(path):
        return Path(path).open("rb")
    return cast(BinaryIO, FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED))


def read_bytes(path: str) -> bytes:
    """Reads a whole file."""
    with open_read(path) as file:
        return file.read()


@contextmanager
def write_whole(path: str) -> Iterator[BinaryIO]:
    """Opens `path` for writing so that it appears whole or not at all.

    A local file is written under a temporary name beside it, flushed to disk and renamed. An
    object store makes an object visible only when its upload ends, so there the final name is
    written at once, and a failed upload is abandoned.

    Args:
      path: the final name; its local parent folders are made.

    Yields:
      A binary file to write to; its ``name`` is a local path, for writers that want one.
    """
    if is_local(path):
        final = Path(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(final)
        finally:
            temporary.unlink(missing_ok=True)
        return
    # Beam's writers finish the upload in close(), even while an exception is on its way: what is
    # written is therefore collected first, and put in one go only when it is complete.
    with tempfile.NamedTemporaryFile() as spool:
        yield cast(BinaryIO, spool)
        spool.flush()
        spool.seek(0)
        _put(path, cast(BinaryIO, spool))


def _put(path: str, source: BinaryIO) -> None:
    with FileSystems.create(
        path,
        mime_type="application/octet-stream",
        compression_type=CompressionTypes.UNCOMPRESSED,
    ) as target:
        while chunk := source.read(8 << 20):
            target.write(chunk)


def write_bytes(path: str, data: bytes) -> None:
    """Writes a whole small file, see `write_whole`."""
    with write_whole(path) as file:
        file.write(data)


def exists(path: str) -> bool:
    """Tells whether a file (not a folder, on object stores) is there."""
    return Path(path).exists() if is_local(path) else bool(FileSystems.exists(path))


def list_names(folder: str) -> list[str]:
    """Lists the names of the files that lie directly in a folder; none if it is not there."""
    if is_local(folder):
        try:
            with os.scandir(folder) as entries:
                return sorted(entry.name for entry in entries if entry.is_file())
        except FileNotFoundError:
            return []
    base = folder.rstrip("/") + "/"
    found = FileSystems.match([_quoted(base) + "*"])[0].metadata_list
    return sorted(name for entry in found if (name := entry.path[len(base) :]))


def list_below(folder: str) -> list[str]:
    """Lists all files below a folder, as paths relative to it; none if it is not there."""
    if is_local(folder):
        return sorted(
            str(file.relative_to(folder)) for file in Path(folder).rglob("*") if file.is_file()
        )
    base = folder.rstrip("/") + "/"
    found = FileSystems.match([_quoted(base) + "**"])[0].metadata_list
    return sorted(name for entry in found if (name := entry.path[len(base) :]))


def _quoted(path: str) -> str:
    # Beam has no way to quote: a wildcard in a class of its own stands for itself.
    return re.sub(r"[*?\[]", lambda found: f"[{found.group()}]", path)


def delete(path: str) -> None:
    """Deletes one file; nothing happens if it is not there."""
    if is_local(path):
        Path(path).unlink(missing_ok=True)
    elif exists(path):
        FileSystems.delete([_quoted(path)])


def delete_folder(folder: str) -> None:
    """Deletes a folder with all that is below it; nothing happens if it is not there."""
    if is_local(folder):
        shutil.rmtree(folder, ignore_errors=True)
    elif names := list_below(folder):
        FileSystems.delete([_quoted(join(folder, name)) for name in names])


def move(source: str, target: str) -> None:
    """Moves one file over another of the same filesystem: by rename, or by copy and delete."""
    if is_local(target):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(source).replace(target)
        return
    FileSystems.copy([source], [target])
    delete(source)
