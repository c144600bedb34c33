"""Archives of modules: fetched over HTTP(S), and unpacked without trusting them."""

import tarfile
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError, ProtocolError
from urllib3.exceptions import TimeoutError as Urllib3TimeoutError
from urllib3.util import Retry

from hubbeam.modules.errors import RunError

# Called with the URL, the bytes received and the bytes expected (None when the server is silent).
Progress = Callable[[str, int, int | None], None]

MAX_BYTES = 4 * 2**30
MAX_UNPACKED_BYTES = 8 * 2**30
MAX_FILES = 10_000
ARCHIVES = (".tar.gz", ".tgz", ".tar")
_BUSY = (408, 429, 500, 502, 503, 504)


def archive_url(handle: str) -> str:
    """Returns the URL of a module's archive.

    A handle that is no archive itself is asked for in TF-Hub's compressed form
    (https://www.tensorflow.org/hub/hosting): ``?tf-hub-format=compressed``.
    """
    parts = urlsplit(handle)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    if parts.path.endswith(ARCHIVES) or "tf-hub-format" in query:
        return handle
    query["tf-hub-format"] = "compressed"
    return urlunsplit(parts._replace(query=urlencode(query)))


def download(
    url: str,
    target: Path,
    *,
    progress: Progress | None = None,
    timeout: tuple[float, float] = (10.0, 60.0),
    attempts: int = 4,
    backoff: float = 1.0,
    max_bytes: int = MAX_BYTES,
) -> None:
    """Fetches a file over HTTP(S).

    Refused connections, servers that are busy or fail, and answers that end early are tried again
    after a growing pause.

    Args:
      url: what to fetch; redirects are followed.
      target: file to write; on failure it is removed.
      progress: told how far it is.
      timeout: seconds to wait for the connection, and for each piece of the answer.
      attempts: how often to try.
      backoff: seconds before the second attempt; doubled each time.
      max_bytes: give up on anything larger.

    Raises:
      RunError: the file could not be had; the message says why.
    """
    # Retry-After of a busy server is obeyed by urllib3; what fails while the body is read is ours.
    retry = Retry(
        total=attempts - 1,
        connect=1,  # no network at all is told soon
        backoff_factor=backoff / 2,
        backoff_max=30,
        status_forcelist=_BUSY,
        allowed_methods=["GET"],
    )
    with requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry))
        for attempt in range(attempts):
            try:
                _receive(session, url, target, progress, timeout, max_bytes)
                return
            except (requests.exceptions.ChunkedEncodingError, HTTPError, TimeoutError) as e:
                fault: Exception = e  # the answer broke off
            except (requests.exceptions.RequestException, RunError) as e:
                target.unlink(missing_ok=True)
                raise RunError(f"{url} could not be fetched: {_plain(e)}") from e
            if attempt < attempts - 1:
                time.sleep(min(backoff * 2**attempt, 30))
    target.unlink(missing_ok=True)
    raise RunError(f"{url} could not be fetched: {_plain(fault)}") from fault


def unpack(
    archive: Path,
    folder: Path,
    *,
    max_bytes: int = MAX_UNPACKED_BYTES,
    max_files: int = MAX_FILES,
) -> None:
    """Unpacks a tar archive (compressed or not) that nobody vouches for.

    Only plain files and folders below `folder` are written: links, devices, absolute names and
    names with ``..`` refuse the whole archive, and so does one that is too large.

    Args:
      archive: the file; judged by its content, not its name.
      folder: an existing folder.
      max_bytes: bytes of all files together.
      max_files: entries of the archive.

    Raises:
      RunError: the archive is none, is damaged, or is refused.
    """
    try:
        with tarfile.open(archive, "r:*") as tar:
            # Python's own filter stands behind our checks, wherever this Python has it.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            size = 0
            for count, member in enumerate(tar, 1):
                size += member.size
                if count > max_files:
                    raise RunError(f"the archive is refused: more than {max_files} entries")
                if size > max_bytes:
                    raise RunError(f"the archive is refused: more than {max_bytes} bytes in it")
                if fault := _fault(member):
                    raise RunError(f"the archive is refused: {member.name!r} {fault}")
                tar.extract(member, folder, set_attrs=False)
            # tarfile stops where the archive says it ends; the checksum of gzip stands after that.
            rest = 0
            while tar.fileobj and rest <= max_bytes and (more := tar.fileobj.read(1 << 20)):
                rest += len(more)
    except (tarfile.TarError, EOFError, OSError, ValueError) as e:
        with archive.open("rb") as file:
            start = file.read(64).lstrip()[:20].lower()
        if start.startswith((b"<!doctype", b"<html")):
            raise RunError("a web page came instead of an archive") from e
        raise RunError(f"the archive is damaged or none: {e or type(e).__name__}") from e
    except Exception as e:
        # zlib and lzma have errors of their own that share no base class.
        if type(e).__module__ in ("zlib", "_lzma", "lzma"):
            raise RunError(f"the archive is damaged: {e}") from e
        raise


def _receive(
    session: requests.Session,
    url: str,
    target: Path,
    progress: Progress | None,
    timeout: tuple[float, float],
    max_bytes: int,
) -> None:
    with session.get(url, stream=True, timeout=timeout) as response:
        response.raise_for_status()
        length = response.headers.get("Content-Length")
        total = int(length) if length and length.isdigit() else None
        if total is not None and total > max_bytes:
            raise RunError(f"it has {total} bytes, more than {max_bytes}")
        done = 0
        with target.open("wb") as file:
            # stream() undoes a Content-Encoding, counts against Content-Length what came over the
            # wire, and raises when that is less.
            for piece in response.raw.stream(1 << 18, decode_content=True):
                done += file.write(piece)
                if done > max_bytes:
                    raise RunError(f"it has more than {max_bytes} bytes")
                if progress:
                    progress(url, response.raw.tell(), total)


def _fault(member: tarfile.TarInfo) -> str | None:
    path = PurePosixPath(member.name.replace("\\", "/"))
    if path.is_absolute() or (path.parts and path.parts[0].endswith(":")):
        return "is an absolute name"
    if ".." in path.parts:
        return "leaves its folder"
    if member.issym() or member.islnk():
        return "is a link"
    if not (member.isreg() or member.isdir()):
        return "is no plain file"
    return None


def _plain(error: Exception) -> str:
    if isinstance(error, requests.exceptions.HTTPError) and error.response is not None:
        return f"HTTP {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.exceptions.RetryError):
        return "the server is busy or failing (HTTP 429 or 5xx) again and again"
    if isinstance(error, requests.exceptions.Timeout | Urllib3TimeoutError | TimeoutError):
        return "no answer in time"
    if isinstance(error, ProtocolError):
        return "the answer ends early, again and again"
    if isinstance(error, requests.exceptions.ConnectionError):
        return "no connection, or no such host"
    return str(error) or type(error).__name__
