"""The store: modules pinned by the sha256 of their files, in a local folder or below ``gs://``.

Layout::

  handles/<sha256 of a handle>.json     which entry holds the module of that handle
  <slug>-<first 12 of sha256>/          an entry: one module, never changed once it is there
    module/                             the module's files
    artifacts/                          what engines keep beside it: their choice, converted models
    entry.json                          sha256 of every file, what is in the module; written last

An entry is named by its content. So two processes that store the same module at once do no harm,
and a module that changes at its source becomes another entry: running jobs keep theirs.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError

from hubbeam.modules.download import ARCHIVES, Progress, archive_url, download, unpack
from hubbeam.modules.errors import ConfigError, RunError
from hubbeam.modules.files import (
    GCS,
    download_gcs,
    join,
    list_gcs,
    read,
    upload_gcs,
    write,
)
from hubbeam.modules.inspect import choose, inspect_module, is_module
from hubbeam.modules.spec import ModuleInfo, ModuleSpec, ResolvedModule, load_spec, spec_names

_STALE_SECONDS = 24 * 3600
_ARTIFACT = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


class StoredFile(BaseModel):
    """Size and hash of one file of an entry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    sha256: str


class Entry(BaseModel):
    """The ``entry.json`` of a module in the store.

    Attributes:
      handle: what it was asked by first.
      source: where its files came from.
      sha256: hash over the sorted paths and sha256s of its files, see `tree_sha256`.
      files: the module's files by path below ``module/``.
      info: what is in the module, so that TensorFlow is not needed to know it.
      fetched_at: when, UTC.
      hubbeam: version that wrote it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    handle: str
    source: str
    sha256: str
    files: dict[str, StoredFile]
    info: ModuleInfo
    fetched_at: datetime
    hubbeam: str


class Stored(NamedTuple):
    """A module in the store: the handle it is known by, the entry's place, and the entry."""

    handle: str
    place: str
    entry: Entry


class _Wanted(NamedTuple):
    """What the user asked for."""

    name: str
    handle: str
    mirrors: tuple[str, ...]
    spec: ModuleSpec | None

    @property
    def asked(self) -> str:
        return self.spec.name if self.spec else self.handle


def cache_folder() -> Path:
    """Returns hubbeam's folder in the user's cache directory."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "hubbeam"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hubbeam"


def slug(handle: str) -> str:
    """Returns the name of a module that is known by its handle alone.

    It is the last part of the handle that names a model: versions (``1``), ``feature_vector``,
    ``classification`` and ``quantops`` are passed over, and so are archive suffixes. So
    ``https://example.org/some/feature_vector/1.tar.gz`` is ``some``.
    """
    url = urlsplit(handle)
    path = f"{url.netloc}/{url.path}" if "://" in handle else handle
    parts = [p for p in re.split(r"[/\\]", path) if p]
    if parts:
        for suffix in ARCHIVES:
            parts[-1] = parts[-1].removesuffix(suffix)
    safe = [re.sub(r"[^A-Za-z0-9._-]+", "_", part).strip("._-")[:80] for part in parts]
    passed = re.compile(r"|v?\d+|feature[_-]vector|classification|quantops|versions|variations")
    named = [part for part in safe if not passed.fullmatch(part)]
    return named[-1] if named else "module"


def tree_sha256(files: dict[str, StoredFile]) -> str:
    """Returns the sha256 of a module: over its files' sorted paths and sha256s."""
    lines = "".join(f"{files[path].sha256}  {path}\n" for path in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def hash_files(folder: Path) -> dict[str, StoredFile]:
    """Returns size and sha256 of every file below `folder`, by its path with forward slashes."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            digest = hashlib.sha256()
            with file.open("rb") as opened:
                while piece := opened.read(1 << 20):
                    digest.update(piece)
            found[file.relative_to(folder).as_posix()] = StoredFile(
                size=file.stat().st_size, sha256=digest.hexdigest()
            )
    return found


class Store:
    """Modules by name or handle, each pinned by its content.

    Attributes:
      root: the local folder, or ``gs://bucket/folder``.
    """

    def __init__(self, root: str | Path | None = None):
        """Names the store; nothing is written yet.

        Args:
          root: a folder or ``gs://`` path; None takes ``$HUBBEAM_STORE``, else the user's cache.
        """
        place = str(root or os.environ.get("HUBBEAM_STORE") or cache_folder() / "store")
        if "://" in place and not place.startswith(GCS):
            raise ConfigError(f"the store {place} must be a local folder or a gs:// path")
        if place.startswith(GCS):
            self.root = place.rstrip("/")
        else:
            self.root = str(Path(place).expanduser().absolute())

    def resolve(
        self,
        name_or_handle: str,
        *,
        signature: str | None = None,
        offline: bool = False,
        progress: Progress | None = None,
    ) -> ResolvedModule:
        """Finds a module, fetching it if it is not in the store, and pins it.

        TensorFlow is not imported for a module that is in the store already.

        Args:
          name_or_handle: a name of `spec_names`, the path of a YAML file, or a handle: ``https://``,
            the URL of an archive, ``gs://``, a folder, or what a resolver registered with
            tensorflow_hub knows.
          signature: the signature to call instead of the module's own for feature vectors.
          offline: never use the network.
          progress: told how far a download is.

        Raises:
          ConfigError: it cannot be had, its entry is damaged, it has no such signature, or it is
            not what its description says.
        """
        wanted = _wanted(name_or_handle)
        stored = self._current(wanted) or self._fetch(wanted, offline, progress)
        return _resolved(wanted, stored, signature)

    def fetch(
        self, name_or_handle: str, *, progress: Progress | None = None
    ) -> tuple[ResolvedModule, bool]:
        """Gets a module into the store; a damaged entry is fetched again.

        Returns:
          The module, and whether it was fetched now.
        """
        wanted = _wanted(name_or_handle)
        try:
            stored, fetched = self._current(wanted), False
        except DamagedError:
            stored = None
        if stored is None:
            stored, fetched = self._fetch(wanted, False, progress), True
        return _resolved(wanted, stored, None), fetched

    def add(
        self, folder: str | Path, name_or_handle: str, *, source: str | None = None
    ) -> ResolvedModule:
        """Puts a copy of a module in the store.

        Args:
          folder: the module's folder, or its archive.
          name_or_handle: what it shall be known by from now on.
          source: where it came from, for the record; None means the folder.

        Raises:
          ConfigError: it is no module, or not what the description of that name says.
        """
        wanted = _wanted(name_or_handle)
        if not _is_archive(str(folder)):
            return _resolved(wanted, self._add(Path(folder), wanted, source or str(folder)), None)
        with _staging(self._scratch()) as staging:
            try:
                unpacked = _get(str(folder), staging, None)
            except RunError as e:
                raise ConfigError(str(e)) from e
            return _resolved(wanted, self._add(unpacked, wanted, source or str(folder)), None)

    def find(self, name_or_handle: str) -> Stored | None:
        """Returns a module's entry if it is in the store, checked; does not fetch."""
        return self._current(_wanted(name_or_handle))

    def get(self, name_or_handle: str) -> Stored:
        """Returns a module's entry, checked; does not fetch.

        Raises:
          ConfigError: it is not in the store, or damaged.
        """
        wanted = _wanted(name_or_handle)
        if stored := self._current(wanted):
            return stored
        _check_name(wanted)
        again = f"`hubbeam modules fetch {wanted.asked}` gets it"
        raise ConfigError(f"module {wanted.asked} is not in the store {self.root}: {again}")

    def handles(self) -> list[str]:
        """Returns the handles whose modules are in the store, sorted; `find` tells more."""
        pointers = (read(join(self.root, "handles", n)) for n in _pointers(self.root))
        return sorted(str(json.loads(p)["handle"]) for p in pointers if p)

    def verify(self, name_or_handle: str) -> Stored:
        """Compares every file of a stored module with its sha256, where it is stored.

        Raises:
          ConfigError: it is not in the store, or a file is missing, new or changed.
        """
        stored = self.get(name_or_handle)
        if stored.place.startswith(GCS):
            for path, file in stored.entry.files.items():
                data = read(join(stored.place, "module", path)) or b""
                if hashlib.sha256(data).hexdigest() != file.sha256:
                    raise _damaged(stored.place, stored.entry, f"{path} is changed")
        return stored

    def local_folder(self, module: ResolvedModule) -> Path:
        """Returns a local folder with the module's files, compared with their sha256s just now.

        An entry below ``gs://`` is copied to this machine once.

        Raises:
          ConfigError: the entry is gone, damaged, or not the one that was pinned.
        """
        entry = _read_entry(module.entry)
        if entry is None:
            raise ConfigError(f"module {module.name}: its store entry {module.entry} is gone")
        if entry.sha256 != module.sha256:
            raise _damaged(module.entry, entry, f"it was sha256 {module.sha256} when the job began")
        if not module.entry.startswith(GCS):
            _check(Path(module.entry), entry)
            return Path(module.entry) / "module"
        copies = _copies_folder()
        copy = copies / module.entry.rsplit("/", 1)[1]
        try:
            if _read_entry(str(copy)) is not None:
                _check(copy, entry)
                return copy / "module"
        except DamagedError:
            shutil.rmtree(copy, ignore_errors=True)
        with _staging(copies) as staging:
            for path in entry.files:
                target = staging / "module" / path
                target.parent.mkdir(parents=True, exist_ok=True)
                download_gcs(join(module.entry, "module", path), target)
            if (found := hash_files(staging / "module")) != entry.files:
                raise _damaged(module.entry, entry, _difference(found, entry.files))
            (staging / "entry.json").write_text(entry.model_dump_json())
            _publish(staging, copy)
        return copy / "module"

    def put_artifact(self, module: ResolvedModule, name: str, data: bytes) -> None:
        """Keeps a small file beside a module, whole or not at all, in place of an older one.

        Args:
          module: the module.
          name: file name of letters, digits, ``.``, ``_`` and ``-``.
          data: its content.

        Raises:
          OSError: the store cannot be written; what depends on an artifact must do without it.
        """
        write(_artifact(module, name), data)

    def get_artifact(self, module: ResolvedModule, name: str) -> bytes | None:
        """Returns what `put_artifact` kept, None if there is nothing."""
        return read(_artifact(module, name))

    def _current(self, wanted: _Wanted) -> Stored | None:
        """Returns the checked entry of what is wanted, None if there is none (or an older one)."""
        if _is_archive(wanted.handle):
            return None  # it may have changed since; unpacking it is cheap
        folder = _folder(wanted.handle)
        for handle in (wanted.handle, *wanted.mirrors):
            pointer = read(self._pointer(handle))
            place = join(self.root, json.loads(pointer)["entry"]) if pointer else ""
            entry = _read_entry(place) if place else None
            if entry is None:
                continue
            if folder and tree_sha256(hash_files(folder)) != entry.sha256:
                continue  # the folder has changed since
            if place.startswith(GCS):
                sizes = list_gcs(join(place, "module"))
                for path, file in entry.files.items():
                    if sizes.get(path) != file.size:
                        raise _damaged(place, entry, f"{path} is missing or changed")
            else:
                _check(Path(place), entry)
            return Stored(handle, place, entry)
        return None

    def _fetch(self, wanted: _Wanted, offline: bool, progress: Progress | None) -> Stored:
        _check_name(wanted)
        faults = []
        for handle in (wanted.handle, *wanted.mirrors):
            if folder := _folder(handle) or _hub_cached(handle):
                return self._add(folder, wanted, handle)
            if offline and not _is_archive(handle):
                continue
            with _staging(self._scratch()) as staging:
                try:
                    fetched = _get(handle, staging, progress)
                except RunError as e:
                    faults.append(str(e) if handle in str(e) else f"{handle}: {e}")
                    continue
                return self._add(fetched, wanted, handle)
        raise ConfigError(_how_to_get(wanted, self.root, faults))

    def _add(self, folder: Path, wanted: _Wanted, source: str) -> Stored:
        with _staging(self._scratch()) as staging:
            module = staging / "module"
            if not folder.exists():
                raise ConfigError(f"there is no file or folder {folder}")
            if not is_module(folder):
                raise ConfigError(f"{folder} holds no module: there is no saved_model.pb in it")
            try:
                shutil.copytree(folder, module)
            except OSError as e:
                raise ConfigError(f"the module in {folder} cannot be copied: {e}") from e
            info = inspect_module(module)
            _check_spec(wanted, info, None)
            entry = _entry(wanted.handle, source, module, info)
            name = f"{wanted.name}-{entry.sha256[:12]}"
            place = join(self.root, name)
            if place.startswith(GCS):
                for path in entry.files:
                    upload_gcs(module / path, join(place, "module", path))
                write(join(place, "entry.json"), entry.model_dump_json(indent=1).encode())
            else:
                (staging / "entry.json").write_text(entry.model_dump_json(indent=1))
                _publish(staging, Path(place))
            pointer = {"handle": wanted.handle, "entry": name, "sha256": entry.sha256}
            write(self._pointer(wanted.handle), json.dumps(pointer).encode())
        return Stored(wanted.handle, place, entry)

    def _pointer(self, handle: str) -> str:
        return join(self.root, "handles", hashlib.sha256(handle.encode()).hexdigest() + ".json")

    def _scratch(self) -> Path:
        # Beside the entries, so that a rename publishes.
        return _copies_folder() if self.root.startswith(GCS) else Path(self.root)


def resolve_folder(folder: str | Path, signature: str | None = None) -> ResolvedModule:
    """Pins a module's folder as it stands, outside any store.

    Raises:
      ConfigError: it is no module, or has no such signature.
    """
    path = Path(folder).expanduser().resolve()
    info = inspect_module(path)
    entry = _entry(str(path), str(path), path, info)
    wanted = _Wanted(slug(str(path)), str(path), (), None)
    return _resolved(wanted, Stored(str(path), str(path), entry), signature)


class DamagedError(ConfigError):
    """An entry of the store is not what it was when it was written."""


def _entry(handle: str, source: str, folder: Path, info: ModuleInfo) -> Entry:
    files = hash_files(folder)
    return Entry(
        handle=handle,
        source=source,
        sha256=tree_sha256(files),
        files=files,
        info=info,
        fetched_at=datetime.now(timezone.utc).replace(microsecond=0),
        hubbeam=version("hubbeam"),
    )


def _damaged(place: str, entry: Entry | None, fault: str) -> DamagedError:
    again = f"hubbeam modules fetch {_wanted(entry.handle).asked if entry else 'MODULE'}"
    return DamagedError(
        f"the store entry {place} is damaged: {fault}; `{again}` fetches the module again"
    )


def _wanted(name_or_handle: str) -> _Wanted:
    if not name_or_handle:
        raise ConfigError("the module's name is empty")
    if name_or_handle in spec_names() or name_or_handle.endswith((".yaml", ".yml")):
        spec = load_spec(name_or_handle)
        return _Wanted(spec.name, spec.handle, spec.mirrors, spec)
    handle = name_or_handle.rstrip("/")
    if "://" not in handle and (Path(name_or_handle).expanduser().exists() or "/" in handle):
        handle = str(Path(name_or_handle).expanduser().resolve())
    # A handle that one of our descriptions names is that module.
    for spec in map(load_spec, spec_names()):
        places = (spec.handle, *spec.mirrors)
        if handle in places:
            return _Wanted(spec.name, handle, tuple(p for p in places if p != handle), spec)
    return _Wanted(slug(handle), handle, (), None)


def _check_name(wanted: _Wanted) -> None:
    """Raises ConfigError, which tells the names there are, if a name is none."""
    if not wanted.spec and "/" not in wanted.handle:
        load_spec(wanted.handle)


def _resolved(wanted: _Wanted, stored: Stored, signature: str | None) -> ResolvedModule:
    info = stored.entry.info
    choice = _check_spec(wanted, info, signature)
    return ResolvedModule(
        name=wanted.name,
        handle=stored.handle,
        sha256=stored.entry.sha256,
        entry=stored.place,
        format=info.format,
        tags=() if info.format == "hub1" else ("serve",),
        signature=choice.signature,
        input=choice.input,
        output=choice.output,
        image_size=choice.image_size,
        width=choice.width,
        untrained=bool(info.notes.get("untrained")),
    )


def _check_spec(wanted: _Wanted, info: ModuleInfo, signature: str | None) -> Any:
    """Compares a module with its description, and returns what to call in it."""
    spec = wanted.spec
    if spec is None:
        return choose(info, signature, wanted.asked)
    choice = choose(info, signature or spec.signature, spec.name)
    says = {"image_size": (spec.image_size,) * 2, "width": spec.expected_width(choice.signature)}
    has = {"image_size": choice.image_size, "width": choice.width}
    for key, value in says.items():
        if value is not None and value != has[key]:
            raise ConfigError(
                f"module {spec.name}, signature {choice.signature!r}: its description says {key} "
                f"{_plain(value)}, but the module has {_plain(has[key])}"
            )
    return choice


def _plain(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _folder(handle: str) -> Path | None:
    return None if "://" in handle or not Path(handle).is_dir() else Path(handle)


def _is_archive(handle: str) -> bool:
    return "://" not in handle and handle.endswith(ARCHIVES) and Path(handle).is_file()


def _hub_cached(handle: str) -> Path | None:
    """Returns the module in tensorflow_hub's own cache, if the user keeps one."""
    cache = os.environ.get("TFHUB_CACHE_DIR", "")
    if not cache or "://" in cache or "://" not in handle:
        return None
    folder = Path(cache) / hashlib.sha1(handle.encode()).hexdigest()
    return folder if is_module(folder) else None


def _get(handle: str, staging: Path, progress: Progress | None) -> Path:
    """Gets a module from anywhere but a local folder; returns the folder it stands in."""
    archive, folder = staging / "archive", staging / "fetched"
    folder.mkdir()
    if _is_archive(handle):
        return _unpacked(Path(handle), folder, handle)
    if handle.startswith(("http://", "https://")):
        url = archive_url(handle)
        download(url, archive, progress=progress)
        return _unpacked(archive, folder, url)
    if handle.startswith(GCS):
        if handle.endswith(ARCHIVES):
            download_gcs(handle, archive)
            return _unpacked(archive, folder, handle)
        sizes = list_gcs(handle)
        if not {"saved_model.pb", "saved_model.pbtxt"} & set(sizes):
            raise RunError(f"{handle} holds no module: there is no saved_model.pb in it")
        for path in sizes:
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            download_gcs(join(handle, path), target)
        return folder
    # Whatever else it is: tensorflow_hub may have a resolver for it, registered by the user.
    if Path(handle).exists():
        raise RunError(f"{handle} is neither a module's folder nor an archive of one")
    from hubbeam.modules.engines.tensorflow import import_tensorflow

    import_tensorflow()  # without its notices, before tensorflow_hub imports it
    import tensorflow_hub

    try:
        resolved = Path(tensorflow_hub.resolve(handle))
    except Exception as e:
        raise RunError(f"{handle} is unknown to tensorflow_hub: {e}") from e
    if not is_module(resolved):
        raise RunError(f"{handle} holds no module: there is no saved_model.pb in it")
    return resolved


def _unpacked(archive: Path, folder: Path, where: str) -> Path:
    try:
        unpack(archive, folder)
    except RunError as e:
        raise RunError(f"{where}: {e}") from e
    inside = [p for p in folder.iterdir() if p.is_dir()]
    for place in (folder, *(inside if len(inside) == 1 else ())):
        if is_module(place):
            return place
    raise RunError(f"{where}: there is no module in the archive (no saved_model.pb)")


def _how_to_get(wanted: _Wanted, root: str, faults: list[str]) -> str:
    urls = [
        archive_url(h)
        for h in (wanted.handle, *wanted.mirrors)
        if h.startswith(("http://", "https://"))
    ]
    urls.sort(key=lambda url: not url.endswith(ARCHIVES))
    lines = [f"module {wanted.asked} is not in the store {root}"]
    lines += [f"  tried: {fault}" for fault in faults]
    if not faults:
        lines[0] += ", and the network is not to be used"
    lines += [
        "Bring it here in one of these ways:",
        f"  - on a machine with network: `hubbeam modules fetch {wanted.asked} --store DIR`, copy "
        "DIR here, and give `--store DIR`",
    ]
    if urls:
        keep = f"`hubbeam modules fetch {wanted.asked} --from FILE.tar.gz`"
        lines.append(f"  - download {urls[0]} as FILE.tar.gz, and run {keep}")
    if wanted.spec and wanted.spec.checkpoint:
        lines.append(
            f"  - download {wanted.spec.checkpoint.url} and rebuild the module: `hubbeam modules "
            f"build {wanted.asked} --checkpoint FILE --output DIR`, then `hubbeam modules fetch "
            f"{wanted.asked} --from DIR`"
        )
    return "\n".join(lines)


def _read_entry(place: str) -> Entry | None:
    """Reads an entry.json; None if there is none."""
    data = read(join(place, "entry.json"))
    if data is None:
        return None
    try:
        entry = Entry.model_validate_json(data)
    except ValidationError as e:
        raise _damaged(place, None, "entry.json is not readable") from e
    bad = [p for p in entry.files if PurePosixPath(p).is_absolute() or ".." in p.split("/")]
    name = place.rstrip("/").rsplit("/", 1)[1]
    if bad or tree_sha256(entry.files) != entry.sha256 or name[-12:] != entry.sha256[:12]:
        raise _damaged(place, entry, "entry.json is changed")
    return entry


def _check(place: Path, entry: Entry) -> None:
    found = hash_files(place / "module")
    if found != entry.files:
        raise _damaged(str(place), entry, _difference(found, entry.files))


def _difference(found: dict[str, StoredFile], wanted: dict[str, StoredFile]) -> str:
    missing = sorted(wanted.keys() - found.keys())
    added = sorted(found.keys() - wanted.keys())
    changed = sorted(p for p in wanted.keys() & found.keys() if found[p] != wanted[p])
    kinds = ((missing, "missing"), (changed, "changed"), (added, "not part of it"))
    return "; ".join(
        f"{', '.join(paths)} {'is' if len(paths) == 1 else 'are'} {what}"
        for paths, what in kinds
        if paths
    )


def _artifact(module: ResolvedModule, name: str) -> str:
    if not _ARTIFACT.match(name):
        raise ValueError(f"artifact name {name!r} has other characters than A-Z a-z 0-9 . _ -")
    return join(module.entry, "artifacts", name)


def _pointers(root: str) -> list[str]:
    folder = join(root, "handles")
    if root.startswith(GCS):
        return list(list_gcs(folder))
    return [file.name for file in Path(folder).glob("[!.]*")]


def _copies_folder() -> Path:
    """Returns the folder for copies of ``gs://`` entries, for workers without a home too."""
    folder = cache_folder() / "copies"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    folder = Path(tempfile.gettempdir()) / f"hubbeam-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ConfigError(f"{folder} belongs to somebody else")
    return folder


@contextmanager
def _staging(root: Path) -> Iterator[Path]:
    """Gives a temporary folder in `root`, removed afterwards; sweeps up those of dead processes."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=root))
    except OSError as e:
        raise ConfigError(f"the store {root} cannot be written: {e}") from e
    for old in root.glob(".staging-*"):
        with suppress(FileNotFoundError):
            if time.time() - old.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, place: Path) -> None:
    """Renames a finished entry to its place, unless the same entry stands there whole."""
    staging.chmod(0o755)  # mkdtemp lets nobody else in
    try:
        staging.rename(place)
        return
    except OSError:
        if not place.is_dir():
            raise
    try:
        entry = _read_entry(str(place))
        if entry is not None:
            _check(place, entry)
            return  # it was there, or another process was faster
    except DamagedError:
        pass
    shutil.move(place, staging.with_name(f"{staging.name}-damaged"))
    shutil.rmtree(staging.with_name(f"{staging.name}-damaged"), ignore_errors=True)
    staging.rename(place)
