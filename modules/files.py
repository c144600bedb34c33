"""Files in a local folder or below ``gs://``, without Apache Beam.

Google Cloud Storage is reached through pyarrow; ``STORAGE_EMULATOR_HOST`` is honoured.
"""

import os
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from hubbeam.modules.errors import ConfigError, RunError

GCS = "gs://"


def join(base: str, *parts: str) -> str:
    """Joins path parts with slashes."""
    return "/".join((base.rstrip("/"), *parts))


def read(path: str) -> bytes | None:
    """Reads a whole file; None if there is none."""
    try:
        if path.startswith(GCS):
            with _gcs().open_input_stream(path.removeprefix(GCS)) as stream:
                return bytes(stream.read())
        return Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e}") from e


def write(path: str, data: bytes) -> None:
    """Writes a whole file, so that it appears whole or not at all."""
    if path.startswith(GCS):
        with _gcs().open_output_stream(path.removeprefix(GCS)) as stream:
            stream.write(data)
        return
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(final)
    finally:
        temporary.unlink(missing_ok=True)


def _gcs() -> Any:
    return _gcs_at(os.environ.get("STORAGE_EMULATOR_HOST", ""))


@lru_cache
def _gcs_at(emulator: str) -> Any:
    from pyarrow.fs import GcsFileSystem

    patience = timedelta(seconds=60)
    if not emulator:
        return GcsFileSystem(retry_time_limit=patience)
    scheme, _, host = emulator.rpartition("://")
    return GcsFileSystem(
        anonymous=True,
        scheme=scheme or "http",
        endpoint_override=host.rstrip("/"),
        retry_time_limit=patience,
    )


def list_gcs(folder: str) -> dict[str, int]:
    """Returns the sizes of all files below a ``gs://`` folder, by path."""
    from pyarrow.fs import FileSelector, FileType

    base = folder.removeprefix(GCS).rstrip("/")
    try:
        found = _gcs().get_file_info(FileSelector(base, recursive=True, allow_not_found=True))
    except OSError as e:
        raise ConfigError(f"{folder} cannot be listed: {e}") from e
    return {
        file.path.removeprefix(base + "/"): file.size
        for file in found
        if file.type == FileType.File
    }


def download_gcs(source: str, target: Path) -> None:
    """Copies a file from ``gs://`` to this machine."""
    try:
        with (
            _gcs().open_input_stream(source.removeprefix(GCS)) as stream,
            target.open("wb") as file,
        ):
            while piece := stream.read(8 << 20):
                file.write(piece)
    except OSError as e:
        raise RunError(f"{source} could not be read: {e}") from e


def upload_gcs(source: Path, target: str) -> None:
    """Copies a file of this machine to ``gs://``."""
    with (
        source.open("rb") as file,
        _gcs().open_output_stream(target.removeprefix(GCS)) as stream,
    ):
        while piece := file.read(8 << 20):
            stream.write(piece)
