"""Finds the images of a run: files, folders, globs and tables, on any Beam filesystem.

What an input means:

* A name that exists is taken literally, even if it holds ``*``, ``?`` or ``[``: a file whatever
  its extension, a folder with all image files below it (by extension, see `IMAGE_EXTENSIONS`).
* Otherwise a name with ``*``, ``?`` or ``[...]`` is a glob, matched against files only, whatever
  their extension. ``*`` and ``?`` stay within one folder, ``**`` crosses folders, and ``**/`` also
  stands for no folder at all. Wildcards match names that begin with a dot too.
* ``file://`` URIs are local files; their percent-escapes are decoded.

Object stores (``gs://``, and others that Beam has a filesystem for) are listed by prefix; a folder
is a prefix that ends in ``/``. Below a folder that is really named ``[x]`` write ``[[]x]/*.jpg``
there; on local disks ``[x]/*.jpg`` finds it too. Only ``gs://`` is listed by several threads and
as a stream: of the others Beam gives the whole listing at once. On filesystems with real folders
(``hdfs://``) a table must name the files.

Local files are named by their absolute path, ``.`` and ``..`` resolved but links kept, so that one
file reached by two spellings is one uri. Links to folders are followed, except where they lead
back to a folder above them. Pipes, sockets and devices are never opened.
"""

import errno
import logging
import os
import queue
import re
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from typing import Any, BinaryIO, NamedTuple, cast
from urllib.parse import unquote_to_bytes

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from apache_beam.io.filesystems import FileSystems

from hubbeam.modules.errors import ConfigError
from hubbeam.transforms import files

_LOGGER = logging.getLogger(__name__)

LISTING = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64()),
        pa.field("modified", pa.timestamp("us", tz="UTC")),
        pa.field("reason", pa.string()),
        pa.field("message", pa.string()),
    ]
)
"""One row an image; `reason` and `message` are set where the image is a reject of stage "list"."""

IMAGE_EXTENSIONS = frozenset(
    [
        "jpg",
        "jpeg",
        "jpe",
        "jfif",
        "mpo",
        "png",
        "webp",
        "gif",
        "bmp",
        "tif",
        "tiff",
        "pnm",
        "ppm",
        "pgm",
        "pbm",
    ]
)
"""Extensions, lower case, by which a folder's files are taken for images."""

_BATCH_ROWS = 8192
_THREADS = 16  # listing waits for storage, not for the processor
_GCS_RANGES = 16
_SCHEME = re.compile(r"([a-zA-Z][-a-zA-Z0-9+.]*)://")
_MAGIC = re.compile(r"[*?\[]")


class _Row(NamedTuple):
    uri: str
    size: int | None = None
    modified: int | None = None  # microseconds since 1970, UTC
    reason: str | None = None
    message: str | None = None


def list_images(
    inputs: Sequence[str], *, table: str | None = None, uri_column: str | None = None
) -> Iterator[pa.RecordBatch]:
    """Lists the images that `inputs` and `table` name, in no particular order.

    Folders are read by several threads at once; the batches stream out with bounded memory.
    Duplicates are not dropped here (see `hubbeam.transforms.plan.write_plan`).

    A table is Parquet (``.parquet``, ``.pq``, or by its first bytes), CSV with a header
    (``.csv``), or else plain text with one uri a line (blank lines are skipped). Its uris are
    literal: no globs, no folders. Relative paths are relative to the current directory. Local
    files are looked up for size and time; for object stores both stay null, since that would take
    a request an image.

    Args:
      inputs: files, folders and globs.
      table: a file that lists uris.
      uri_column: the table's column of uris; default ``uri``, else its only column.

    Returns:
      Batches of schema `LISTING`. `size_bytes` in bytes, `modified` in UTC.

    Raises:
      ConfigError: for an input that matches nothing, a filesystem that is not installed, or a
        table that cannot be read. What can be known at once is raised by the call itself, the
        rest while the batches are read.
    """
    if not inputs and table is None:
        raise ConfigError("nothing to read: name files, folders or globs, or give --table")
    if uri_column is not None and table is None:
        raise ConfigError("--uri-column says which column of --table to read: give --table too")
    tasks: list[_Task] = []
    for number, text in enumerate(inputs):
        tasks.extend(_start(number, text))
    rows_of_table = _open_table(table, uri_column) if table is not None else None
    return _listing(inputs, tasks, rows_of_table)


def _listing(
    inputs: Sequence[str],
    tasks: "list[_Task]",
    rows_of_table: Iterator[pa.RecordBatch] | None,
) -> Iterator[pa.RecordBatch]:
    if tasks:
        found = [0] * len(inputs)
        yield from _run(tasks, found)
        missing = [text for text, count in zip(inputs, found, strict=True) if not count]
        if missing:
            raise ConfigError(f"no image matches {_quote(missing)}")
    if rows_of_table is not None:
        yield from rows_of_table


def _quote(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more inputs"


# --- what an input is -------------------------------------------------------------------------


class _Task(NamedTuple):
    """A piece of listing: `run` gives rows, and more tasks."""

    number: int  # of the input it belongs to
    run: "Callable[[], Iterable[_Row | _Task]]"


def _start(number: int, text: str) -> "list[_Task]":
    if not text.strip():
        raise ConfigError("an input is an empty name")
    scheme = FileSystems.get_scheme(text)
    if scheme is None or scheme.lower() == "file":
        return [_start_local(number, text)]
    text = text.strip()
    check_filesystem(text)
    if scheme == "gs":
        return [_Task(number, lambda: _list_gcs(number, text))]
    return [_Task(number, lambda: _list_other(text))]


def check_filesystem(uri: str) -> None:
    """Checks that Beam has a filesystem for `uri`.

    Raises:
      ConfigError: if not, saying what to install.
    """
    scheme = FileSystems.get_scheme(uri)
    try:
        FileSystems.get_filesystem(uri)
    except ValueError:
        extra = {"gs": "hubbeam[gcp]", "s3": "apache-beam[aws]", "azfs": "apache-beam[azure]"}
        if scheme in extra:
            advice = f"pip install '{extra[scheme]}'"
        else:
            advice = "use a local path, gs:// or another filesystem that Beam knows"
        raise ConfigError(f"cannot read {scheme}:// ({uri!r}): {advice}") from None


def local_path(text: str) -> str:
    """Makes a local name or ``file://`` URI an absolute path, normalised, links kept."""
    if FileSystems.get_scheme(text) is not None:
        host, slash, path = text.strip()[len("file://") :].partition("/")
        if host not in ("", "localhost") or not slash:
            raise ConfigError(f"{text!r} does not name a file of this machine: use file:///path")
        text = os.fsdecode(unquote_to_bytes("/" + path))
    path = os.path.abspath(text)  # noqa: PTH100  (Path.resolve would follow links)
    return "/" + path.lstrip("/")  # POSIX keeps a leading "//"


def _translate(pattern: str) -> str:
    """Makes a glob a regular expression for a whole path with ``/`` between its parts."""
    out, i = [], 0
    while i < len(pattern):
        c = pattern[i]
        if pattern.startswith("**", i):
            i += 2
            while i < len(pattern) and pattern[i] == "*":
                i += 1
            at_start = i < 3 or pattern[: i - 2].endswith("/")
            if at_start and pattern.startswith("/", i):
                out.append("(?:.*/)?")
                i += 1
            else:
                out.append(".*")
            continue
        i += 1
        if c == "*":
            out.append("[^/]*")
        elif c == "?":
            out.append("[^/]")
        elif c == "[":
            end = i + 1 if pattern[i : i + 1] in ("!", "^") else i
            end = pattern.find("]", end + 1)
            if end < 0:
                out.append(r"\[")
                continue
            inside = pattern[i:end].replace("\\", "\\\\").replace("[", "\\[")
            if inside[0] in "!^":
                out.append(f"(?!/)[^{inside[1:]}]")
            else:
                out.append(f"(?!/)[{inside}]")
            i = end + 1
        else:
            out.append(re.escape(c))
    return "".join(out)


def _compile(pattern: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(_translate(pattern), re.DOTALL)
    except re.error as e:
        raise ConfigError(f"bad pattern {text!r}: {e}") from None


def _is_image_name(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and "." in name


# --- local files ------------------------------------------------------------------------------


def _start_local(number: int, text: str) -> _Task:
    path = local_path(text)
    magic = _MAGIC.search(path) is not None
    if os.path.lexists(path):
        if "*" in path or "?" in path:
            _LOGGER.warning("%r exists under just this name: not used as a pattern", text)
        try:
            mode = os.stat(path).st_mode  # noqa: PTH116
        except OSError:
            return _Task(number, lambda: [_look_up(path)])
        if stat.S_ISDIR(mode):
            return _Task(number, lambda: _walk(number, path, None, path))
        if not stat.S_ISREG(mode):
            raise ConfigError(f"{text!r} is neither a file nor a folder")
        return _Task(number, lambda: [_look_up(path)])
    if not magic:
        parent = os.path.dirname(path)  # noqa: PTH120
        try:
            os.stat(path)  # noqa: PTH116
        except PermissionError:
            raise ConfigError(f"cannot reach {text!r}: permission denied in {parent!r}") from None
        except (OSError, ValueError):
            pass
        raise ConfigError(f"there is no file or folder {text!r}")
    pattern = [part for part in path.split("/") if part]
    _compile(path, text)
    return _Task(number, lambda: _glob(number, "/", pattern))


def _look_up(path: str) -> _Row:
    """Gives the row of one local file that was named, not found by a walk."""
    return _checked_row(path, lambda: os.stat(path))  # noqa: PTH116


def _checked_row(path: str, look: Callable[[], os.stat_result]) -> _Row:
    try:
        path.encode()
    except UnicodeEncodeError:
        return _bad_name(path)
    try:
        info = look()
    except OSError as e:
        return _row_of_error(path, e)
    except ValueError as e:  # a NUL in the name
        return _Row(path, None, None, "not_found", str(e))
    if not stat.S_ISREG(info.st_mode):
        kind = "a folder" if stat.S_ISDIR(info.st_mode) else "a pipe, socket or device"
        return _Row(path, None, None, "not_found", f"is {kind}, not a file")
    return _Row(path, info.st_size, info.st_mtime_ns // 1000)


def _bad_name(path: str) -> _Row:
    shown = os.fsencode(path).decode("utf-8", "backslashreplace")
    return _Row(shown, None, None, "bad_name", "the file's name is not valid UTF-8")


def _row_of_error(path: str, error: OSError) -> _Row:
    try:
        path.encode()
    except UnicodeEncodeError:
        return _bad_name(path)
    if isinstance(error, PermissionError):
        reason = "permission_denied"
    elif isinstance(error, FileNotFoundError | NotADirectoryError):
        reason = "not_found"
        if os.path.islink(path):  # noqa: PTH114
            return _Row(path, None, None, reason, "the link leads to nothing")
    elif error.errno == errno.ELOOP:
        return _Row(path, None, None, "not_found", "the link leads in a circle")
    else:
        reason = "read_failed"
    return _Row(path, None, None, reason, error.strerror or str(error))


def _leads_back(path: str) -> bool:
    """Tells whether the folder `path` is, by a link, one of the folders above it."""
    target = os.stat(path)  # noqa: PTH116
    above = path
    while above != "/":
        above = os.path.dirname(above)  # noqa: PTH120
        if os.path.samestat(target, os.stat(above)):  # noqa: PTH116
            return True
    return False


def _scan(folder: str) -> Iterator[os.DirEntry[str] | _Row]:
    """Gives the entries of a folder, or the reject that stands for it."""
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as e:
        yield _row_of_error(folder + "/", e)


def _walk(
    number: int,
    folder: str,
    matches: re.Pattern[str] | None,
    base: str,
    linked: bool = False,
) -> Iterator[_Row | _Task]:
    """Lists a folder and the folders below it.

    Args:
      number: of the input.
      folder: what to list.
      matches: takes the files whose path below `base` it matches; None takes images.
      base: where the pattern begins.
      linked: whether a link was followed on the way here.
    """
    skip = len(base.rstrip("/")) + 1
    for entry in _scan(folder):
        if isinstance(entry, _Row):
            yield entry
            continue
        path = entry.path
        if matches is None:
            wanted = _is_image_name(entry.name)
        else:
            wanted = matches.fullmatch(path, skip) is not None
        try:
            if entry.is_dir():
                # Below a link even a plain folder may be one that lies above.
                below = linked or entry.is_symlink()
                if not below or not _leads_back(path):
                    yield _Task(number, _walk_later(number, path, matches, base, below))
                continue
            if wanted and (entry.is_file() or _is_dead_link(entry)):
                yield _checked_row(path, entry.stat)
        except OSError as e:
            if wanted:
                yield _row_of_error(path, e)


def _walk_later(
    number: int, path: str, matches: re.Pattern[str] | None, base: str, linked: bool
) -> Callable[[], Iterable[_Row | _Task]]:
    return lambda: _walk(number, path, matches, base, linked)


def _is_dead_link(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)  # noqa: PTH110


def _glob(number: int, folder: str, pattern: Sequence[str]) -> Iterator[_Row | _Task]:
    """Lists what matches `pattern`, the parts of a path below `folder`."""
    for i, part in enumerate(pattern):
        path = os.path.join(folder, part)  # noqa: PTH118
        # A folder that is really named "[x]" is meant as such.
        literal = not _MAGIC.search(part) or (
            "*" not in part and "?" not in part and os.path.lexists(path)
        )
        if not literal:
            break
        if i == len(pattern) - 1:
            if os.path.lexists(path) and not os.path.isdir(path):  # noqa: PTH112
                row = _look_up(path)
                if row.message is None or "not a file" not in row.message:
                    yield row
            return
        folder = path
    else:
        return
    rest = pattern[i:]
    if not os.path.isdir(folder):  # noqa: PTH112
        return
    if "**" in rest[0]:
        matches = re.compile(_translate("/".join(rest)), re.DOTALL)
        yield from _walk(number, folder, matches, folder)
        return
    matches = re.compile(_translate(rest[0]), re.DOTALL)
    for entry in _scan(folder):
        if isinstance(entry, _Row):
            yield entry
            continue
        if not matches.fullmatch(entry.name):
            continue
        try:
            if len(rest) > 1:
                if entry.is_dir() and not (entry.is_symlink() and _leads_back(entry.path)):
                    yield _Task(number, _glob_later(number, entry.path, rest[1:]))
            elif not entry.is_dir() and (entry.is_file() or _is_dead_link(entry)):
                yield _checked_row(entry.path, entry.stat)
        except OSError as e:
            yield _row_of_error(entry.path, e)


def _glob_later(
    number: int, folder: str, pattern: Sequence[str]
) -> Callable[[], Iterable[_Row | _Task]]:
    return lambda: _glob(number, folder, pattern)


# --- object stores ----------------------------------------------------------------------------


def _prefix_and_filter(uri: str) -> tuple[str, Callable[[str], bool]]:
    """Splits a glob into what can be asked of the store, and a test for full names."""
    magic = _MAGIC.search(uri)
    prefix = uri[: magic.start()] if magic else uri
    pattern = _compile(uri, uri)
    return prefix, lambda name: pattern.fullmatch(name) is not None


def _below(uri: str) -> tuple[str, Callable[[str], bool]]:
    return uri.rstrip("/") + "/", _is_image_name


def _list_gcs(number: int, uri: str) -> Iterator[_Row | _Task]:
    # Beam's own listing keeps every name in memory and takes brackets for patterns, so the client
    # that Beam makes is asked directly.
    from apache_beam.io.gcp import gcsio

    match = re.match(r"gs://([^/]+)/?(.*)", uri, re.DOTALL)
    if match is None:
        raise ConfigError(f"{uri!r} names no bucket: gs://bucket/folder")
    bucket, name = match.groups()
    options = FileSystems.get_filesystem(uri)._pipeline_options
    client = gcsio.GcsIO(pipeline_options=options).client
    if name and not name.endswith("/"):
        blob = _ask(uri, lambda: client.bucket(bucket).get_blob(name))
        if blob is not None:
            yield _Row(uri, blob.size, _microseconds(blob.updated))
            return
    folder = name.rstrip("/") + "/"
    if _MAGIC.search(name) and not _ask(
        uri, lambda: list(client.list_blobs(bucket, prefix=folder, max_results=1))
    ):
        prefix, wanted = _prefix_and_filter(uri)
    else:
        prefix, wanted = _below(uri)
    prefix = prefix[len(f"gs://{bucket}/") :]
    # The first names below the prefix show where to cut the listing into ranges that are read side
    # by side.
    borders = _ask(uri, lambda: _gcs_borders(client, bucket, prefix))
    for start, end in zip([None, *borders], [*borders, None], strict=True):
        yield _Task(number, _gcs_range_later(client, bucket, prefix, start, end, wanted, uri))


def _ask(uri: str, request: Callable[[], Any]) -> Any:
    from google.api_core.exceptions import Forbidden, GoogleAPIError, NotFound, Unauthorized
    from google.auth.exceptions import GoogleAuthError

    try:
        return request()
    except (Forbidden, Unauthorized) as e:
        raise ConfigError(f"may not list {uri!r}: {e.message}") from e
    except NotFound as e:
        raise ConfigError(f"cannot list {uri!r}: {e.message}") from e
    except (GoogleAPIError, GoogleAuthError) as e:
        raise ConfigError(f"cannot list {uri!r}: {e}") from e


def _gcs_borders(client: Any, bucket: str, prefix: str) -> list[str]:
    for _ in range(8):
        answer = client.list_blobs(
            bucket, prefix=prefix, delimiter="/", fields="items(name),prefixes,nextPageToken"
        )
        page = next(answer.pages, None)
        names = [blob.name for blob in page] if page is not None else []
        folders = sorted(answer.prefixes)
        if len(folders) == 1 and not names:
            prefix = folders[0]  # a lone folder: look into it
            continue
        names = sorted(names + folders)
        step = max(1, -(-len(names) // _GCS_RANGES))
        # Few names on one page are not worth cutting, folders are: each may hold millions.
        return names[step::step] if folders or answer.next_page_token else []
    return []


def _gcs_range_later(
    client: Any,
    bucket: str,
    prefix: str,
    start: str | None,
    end: str | None,
    wanted: Callable[[str], bool],
    uri: str,
) -> Callable[[], Iterable[_Row]]:
    def rows() -> Iterator[_Row]:
        blobs = iter(
            client.list_blobs(
                bucket,
                prefix=prefix,
                start_offset=start,
                end_offset=end,
                fields="items(name,size,updated),nextPageToken",
            )
        )
        low = (start or "").encode()
        high = None if end is None else end.encode()
        while (blob := _ask(uri, lambda: next(blobs, None))) is not None:
            key = blob.name.encode()
            # Emulators may not know offsets.
            if key < low or (high is not None and key >= high) or blob.name.endswith("/"):
                continue
            name = f"gs://{bucket}/{blob.name}"
            if wanted(name):
                yield _Row(name, blob.size, _microseconds(blob.updated))

    return rows


def _microseconds(moment: datetime | None) -> int | None:
    if moment is None:
        return None
    return int(moment.replace(microsecond=0).timestamp()) * 1_000_000 + moment.microsecond


def _list_other(uri: str) -> Iterator[_Row | _Task]:
    filesystem = FileSystems.get_filesystem(uri)
    if filesystem.has_dirs():  # Beam lists one folder of such a filesystem, and does not tell files
        raise ConfigError(
            f"cannot list {uri!r}: this filesystem has real folders; name its files in a --table"
        )
    try:
        if not uri.endswith("/") and filesystem.exists(uri):
            yield _row_of_metadata(filesystem.metadata(uri))
            return
        path = uri.partition("://")[2]
        prefix, wanted = _below(uri)
        if (
            _MAGIC.search(path)
            and not filesystem.match([_quoted(prefix) + "**"], [1])[0].metadata_list
        ):
            prefix, wanted = _prefix_and_filter(uri)
        for metadata in filesystem.match([_quoted(prefix) + "**"])[0].metadata_list:
            if wanted(metadata.path) and not metadata.path.endswith("/"):
                yield _row_of_metadata(metadata)
    except Exception as e:  # each filesystem of Beam has its own errors
        raise ConfigError(f"cannot list {uri!r}: {e}") from e


def _quoted(prefix: str) -> str:
    # Beam has no way to quote: a wildcard in a class of its own stands for itself.
    return _MAGIC.sub(lambda found: f"[{found.group()}]", prefix)


def _row_of_metadata(metadata: Any) -> _Row:
    seconds = metadata.last_updated_in_seconds
    return _Row(metadata.path, metadata.size_in_bytes, round(seconds * 1e6) if seconds else None)


# --- many threads, few rows in memory -----------------------------------------------------------


def _run(tasks: "list[_Task]", found: list[int]) -> Iterator[pa.RecordBatch]:
    """Runs tasks and the tasks that they give, and yields their rows in batches.

    Args:
      tasks: what to begin with.
      found: rows found by each input; counted up here.
    """
    todo = deque(tasks)
    state = threading.Condition()
    out: queue.Queue[pa.RecordBatch | BaseException | None] = queue.Queue(maxsize=8)
    busy = 0
    stop = False

    def put(item: pa.RecordBatch | BaseException | None) -> None:
        while not stop:
            try:
                return out.put(item, timeout=0.1)
            except queue.Full:
                pass

    def work() -> None:
        nonlocal busy, stop
        rows: list[_Row] = []
        counts: dict[int, int] = {}
        try:
            while True:
                with state:
                    while not todo and busy and not stop:
                        state.wait()
                    if stop or not todo:
                        break
                    task = todo.pop()  # depth first: the queue stays short
                    busy += 1
                try:
                    for item in task.run():
                        if stop:
                            return
                        if isinstance(item, _Task):
                            with state:
                                todo.append(item)
                                state.notify()
                            continue
                        counts[task.number] = counts.get(task.number, 0) + 1
                        rows.append(item)
                        if len(rows) >= _BATCH_ROWS:
                            put(_batch(rows))
                            rows = []
                finally:
                    with state:
                        busy -= 1
                        if not busy:
                            state.notify_all()
            if rows:
                put(_batch(rows))
        except BaseException as e:
            put(e)
        finally:
            with state:
                for number, count in counts.items():
                    found[number] += count
            put(None)

    threads = [
        threading.Thread(target=work, name=f"list-{i}", daemon=True) for i in range(_THREADS)
    ]
    for thread in threads:
        thread.start()
    try:
        running = len(threads)
        while running:
            item = out.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        with state:
            stop = True
            state.notify_all()
        for thread in threads:
            thread.join()


def _batch(rows: Sequence[_Row]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True)
    return pa.record_batch(
        [
            pa.array(list(column), field.type)
            for column, field in zip(columns, LISTING, strict=True)
        ],
        schema=LISTING,
    )


# --- tables ---------------------------------------------------------------------------------------


def _open_table(table: str, uri_column: str | None) -> Iterator[pa.RecordBatch]:
    """Opens a table (errors of its header come at once) and streams its rows."""
    if FileSystems.get_scheme(table) is None or table.lower().startswith("file://"):
        table = local_path(table)
    else:
        check_filesystem(table)
    try:
        with files.open_read(table) as file:
            start = file.read(4)
    except Exception as e:  # each filesystem of Beam has its own errors
        raise ConfigError(f"cannot read the table {table!r}: {e}") from e
    name = table.lower()
    if start[:2] == b"\x1f\x8b":
        raise ConfigError(f"the table {table!r} is compressed: unpack it first")
    if name.endswith((".parquet", ".pq")) or start == b"PAR1":
        uris = _parquet_uris(table, uri_column)
    elif name.endswith(".csv"):
        uris = _csv_uris(table, uri_column)
    elif uri_column is not None:
        raise ConfigError(f"{table!r} is read as one uri a line: it has no column {uri_column!r}")
    else:
        uris = _text_uris(table)
    return _table_rows(table, uris)


def _pick_column(table: str, names: Sequence[str], uri_column: str | None) -> str:
    if uri_column is not None:
        if uri_column in names:
            return uri_column
        raise ConfigError(f"{table!r} has no column {uri_column!r}; it has {', '.join(names)}")
    if "uri" in names:
        return "uri"
    if len(names) == 1:
        if _is_image_name(names[0]) or "/" in names[0]:
            raise ConfigError(
                f"{table!r} seems to have no header: its first line is {names[0]!r}. "
                "Add the line 'uri', or name the file .txt"
            )
        return names[0]
    raise ConfigError(f"{table!r} has no column 'uri': say --uri-column, one of {', '.join(names)}")


_Uris = Iterator[tuple[int, pa.Array]]  # number of the first row (from 1), uris


def _parquet_uris(table: str, uri_column: str | None) -> _Uris:
    file = files.open_read(table)
    try:
        reader = pq.ParquetFile(cast(Any, file))
        column = _pick_column(table, reader.schema_arrow.names, uri_column)
    except pa.ArrowException as e:
        raise ConfigError(f"cannot read the table {table!r}: {e}") from e
    _check_text(table, column, reader.schema_arrow.field(column).type)
    batches = (
        batch.column(0) for batch in reader.iter_batches(batch_size=_BATCH_ROWS, columns=[column])
    )
    return _numbered(table, file, batches)


def _csv_uris(table: str, uri_column: str | None) -> _Uris:
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    try:
        with files.open_read(table) as file:
            names = pyarrow.csv.open_csv(cast(Any, file), parse_options=parse).schema.names
        column = _pick_column(table, names, uri_column)
        convert = pyarrow.csv.ConvertOptions(
            column_types={column: pa.string()}, include_columns=[column]
        )
        file = files.open_read(table)
        reader = pyarrow.csv.open_csv(cast(Any, file), parse_options=parse, convert_options=convert)
    except pa.ArrowException as e:
        raise ConfigError(f"cannot read the table {table!r}: {e}") from e
    return _numbered(table, file, (batch.column(0) for batch in reader))


def _check_text(table: str, column: str, kind: pa.DataType) -> None:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    ):
        raise ConfigError(f"column {column!r} of {table!r} is {kind}, not text")


def _numbered(table: str, file: BinaryIO, columns: Iterator[pa.Array]) -> _Uris:
    first = 1
    with file:
        while True:
            try:
                column = next(columns, None)
            except pa.ArrowException as e:
                raise ConfigError(f"cannot read the table {table!r}: {e}") from e
            if column is None:
                return
            column = column.cast(pa.string())
            try:
                column.validate(full=True)
            except pa.ArrowInvalid:  # not UTF-8: rejects, row by row
                column = column.cast(pa.binary())
            yield first, column
            first += len(column)


def _text_uris(table: str) -> _Uris:
    with files.open_read(table) as file:
        if b"\0" in file.read(1 << 16):
            raise ConfigError(f"{table!r} is no table: neither Parquet nor text")
        file.seek(0)
        lines: list[bytes] = []
        first = 1
        for line in file:
            if first == 1 and not lines:
                line = line.removeprefix(b"\xef\xbb\xbf")
            lines.append(line.removesuffix(b"\n").removesuffix(b"\r"))
            if len(lines) == _BATCH_ROWS:
                yield first, _text_array(lines)
                first += len(lines)
                lines = []
        yield first, _text_array(lines)


def _text_array(lines: Iterable[bytes]) -> pa.Array:
    array = pa.array([line for line in lines if line.strip()], pa.binary())
    try:
        return array.cast(pa.string())
    except pa.ArrowInvalid:  # not UTF-8: rejects, row by row
        return array


def _table_rows(table: str, uris: _Uris) -> Iterator[pa.RecordBatch]:
    checked: set[str] = set()
    total = 0
    pending: deque[Future[pa.RecordBatch]] = deque()
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="list") as pool:
        for first, column in uris:
            if not len(column):
                continue
            _check_cells(table, first, column, checked)
            total += len(column)
            pending.append(pool.submit(_table_batch, column))
            if len(pending) > _THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    if not total:
        raise ConfigError(f"the table {table!r} names no image")


def _check_cells(table: str, first: int, column: pa.Array, checked: set[str]) -> None:
    is_text = pa.types.is_string(column.type)
    trimmed = pc.utf8_trim_whitespace(column) if is_text else column
    empty = pc.fill_null(pc.equal(pc.binary_length(trimmed), 0), True)
    if (at := pc.index(empty, True).as_py()) >= 0:
        raise ConfigError(f"{table!r}: row {first + at} has no uri")
    if not is_text:
        return
    schemes = pc.struct_field(pc.extract_regex(column, r"^(?P<s>[a-zA-Z][-a-zA-Z0-9+.]*)://"), "s")
    for scheme in pc.unique(schemes).to_pylist():
        if scheme is not None and scheme not in checked and scheme.lower() != "file":
            at = pc.index(schemes, scheme).as_py()
            try:
                check_filesystem(column[at].as_py())
            except ConfigError as e:
                raise ConfigError(f"{table!r}: row {first + at}: {e}") from None
            checked.add(scheme)


def _table_batch(column: pa.Array) -> pa.RecordBatch:
    rows = []
    for value in column.to_pylist():
        uri = os.fsdecode(value) if isinstance(value, bytes) else value
        scheme = _SCHEME.match(uri)
        if scheme is None or scheme.group(1).lower() == "file":
            rows.append(_look_up(local_path(uri)))
        else:
            try:
                uri.encode()
                rows.append(_Row(uri))
            except UnicodeEncodeError:
                rows.append(_bad_name(uri))
    return _batch(rows)
