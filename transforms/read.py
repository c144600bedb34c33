"""Image files into bytes, with the storage's failures told apart."""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Condition

from apache_beam.utils import retry

from hubbeam.modules.errors import ImageError
from hubbeam.modules.images import Limits
from hubbeam.transforms import files

ASSUMED_BYTES = 1 << 20
"""What an image of unknown size counts for in the budget of bytes."""


def read_batch(uris: Sequence[str], limits: Limits) -> list[bytes | ImageError]:
    """Reads files; one that cannot be read gives its error in place of its bytes."""
    return [read_or_error(uri, limits) for uri in uris]


def read_or_error(uri: str, limits: Limits) -> bytes | ImageError:
    """Reads one file, see `read_image`; what that raises is returned."""
    try:
        return read_image(uri, limits)
    except ImageError as error:
        return error


def read_image(uri: str, limits: Limits) -> bytes:
    """Reads one file, trying three more times where the storage fails for a moment.

    Args:
      uri: a file on any Beam filesystem.
      limits: ``max_bytes`` is enforced without reading further.

    Returns:
      The file's bytes.

    Raises:
      ImageError: `not_found`, `permission_denied`, `empty`, `too_large` or `read_failed`.
    """
    try:
        data = _read(uri, limits.max_bytes + 1)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(_reason(error), _one_line(error)) from error
    if not data:
        raise ImageError("empty", "the file has no bytes")
    if len(data) > limits.max_bytes:
        raise ImageError("too_large", f"more than {limits.max_bytes} bytes")
    return data


@retry.with_exponential_backoff(
    num_retries=3, initial_delay_secs=0.5, retry_filter=lambda error: _is_transient(error)
)
def _read(uri: str, limit: int) -> bytes:
    if not files.is_local(uri):
        with files.open_read(uri) as file:
            return file.read(limit)
    # Without waiting: opening a pipe would wait for a writer for ever.
    descriptor = os.open(uri, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("unsupported_format", "not a regular file")
        size = status.st_size
        if 0 < size < limit:
            data = os.read(descriptor, size + 1)
            if len(data) == size:  # the end was met
                return data
            os.lseek(descriptor, 0, os.SEEK_SET)
        # Those that say nothing of their size (as below /proc), grow, or come in pieces.
        with os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file:
            return file.read(limit) if size >= limit else file.readall()
    finally:
        os.close(descriptor)


def is_cached(uri: str) -> bool:
    """Tells whether a file is local and in the system's page cache: reading it would not wait.

    Only its last byte, the last that was read, is tried (preadv2(2), RWF_NOWAIT). Where the system
    or the filesystem cannot tell, the answer is no.
    """
    try:
        descriptor = os.open(uri, os.O_RDONLY | os.O_NONBLOCK)
        try:
            last = os.fstat(descriptor).st_size - 1
            return os.preadv(descriptor, [bytearray(1)], last, os.RWF_NOWAIT) == 1
        finally:
            os.close(descriptor)
    except (OSError, ValueError, AttributeError):
        return False


def _reason(error: BaseException) -> str:
    code = getattr(error, "code", None) or getattr(error, "status_code", None)
    if isinstance(error, FileNotFoundError | NotADirectoryError) or code == 404:
        return "not_found"
    if isinstance(error, PermissionError) or code in (401, 403):
        return "permission_denied"
    if isinstance(error, IsADirectoryError):
        return "unsupported_format"
    if isinstance(error, ValueError):  # a scheme that no Beam filesystem serves
        return "not_found"
    return "read_failed"


def _is_transient(error: BaseException) -> bool:
    return not isinstance(error, ImageError) and _reason(error) == "read_failed"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


class ByteBudget:
    """Bytes that may be in memory at once, shared by all threads of a process.

    One that asks for more than the whole budget gets it once nobody else holds any.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._held = 0
        self._changed = Condition()

    def acquire(self, count: int) -> None:
        """Waits until `count` more bytes fit."""
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + count <= self._limit)
            self._held += count

    def correct(self, count: int) -> None:
        """Adds `count` to what is held without waiting: what was reserved turned out larger."""
        with self._changed:
            self._held += count

    def release(self, count: int) -> None:
        """Gives `count` bytes back."""
        with self._changed:
            self._held -= count
            self._changed.notify_all()

    @contextmanager
    def reserve(self, count: int) -> Iterator[None]:
        """Holds `count` bytes while the body runs."""
        self.acquire(count)
        try:
            yield
        finally:
            self.release(count)
