"""The store: real modules from folders, a real HTTP server, archives of all kinds, and gs://."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from hubbeam.modules.download import archive_url, download, unpack
from hubbeam.modules.errors import ConfigError, RunError
from hubbeam.modules.spec import load_spec
from hubbeam.modules.store import Store, slug

NAME = "mobilenet_v2_050_224"


def _tar(files: dict[str, bytes] | Path, mode: str = "w:gz") -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as tar:  # type: ignore[call-overload]
        if isinstance(files, Path):
            tar.add(files, ".")
        else:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


class Server:
    """Serves what `files` holds; `faults` are what goes wrong first at a path, in order."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.asked: list[str] = []
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urlsplit(self.path)
                served.asked.append(self.path)
                faults = served.faults.get(url.path, [])
                fault = faults.pop(0) if faults else ""
                data = served.files.get(url.path)
                compressed = parse_qs(url.query).get("tf-hub-format") == ["compressed"]
                if fault == "busy":
                    self.send_error(503)
                    return
                if data is None or not (compressed or url.path.endswith(".tar.gz")):
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if fault == "stall":
                    time.sleep(2)
                self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture(scope="session")
def packed(original: Path) -> bytes:
    """The original module as TF-Hub serves it: a .tar.gz with its files at the top."""
    return _tar(original)


def _spec(tmp_path: Path, handle: str, **changes: Any) -> str:
    facts = {"name": "mine", "handle": handle, "image_size": 224, "width": 1280} | changes
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(facts))
    return str(file)


# Names.


@pytest.mark.parametrize(
    ("handle", "name"),
    [
        ("https://example.org/some/feature_vector/1.tar.gz", "some"),
        ("https://example.org/some/feature_vector/1?x=y", "some"),
        ("https://tfhub.dev/google/imagenet/inception_v2/classification/1", "inception_v2"),
        ("gs://bucket/models/net.tgz", "net"),
        ("/data/my module/", "my_module"),
        ("/data/../1", "data"),
        ("https://example.org/ü/2", "example.org"),
        ("/ü", "module"),
    ],
)
def test_slug(handle: str, name: str) -> None:
    assert slug(handle) == name


def test_archive_url() -> None:
    assert archive_url("https://h/m/1") == "https://h/m/1?tf-hub-format=compressed"
    assert archive_url("https://h/m/1?a=b") == "https://h/m/1?a=b&tf-hub-format=compressed"
    assert archive_url("https://h/m/1.tar.gz") == "https://h/m/1.tar.gz"


# Folders.


def test_the_original_module_is_what_its_page_says(store: Store) -> None:
    module = store.resolve(NAME, offline=True)
    assert (module.name, module.format, module.tags) == (NAME, "hub1", ())
    assert (module.signature, module.input, module.output) == (
        "image_feature_vector",
        "images",
        "default",
    )
    assert (module.image_size, module.width) == ((224, 224), 1280)
    assert module.handle == load_spec(NAME).handle
    info = store.get(NAME).entry.info
    assert info.tag_sets == ((), ("train",)) and info.fine_tunable
    assert info.variables == 260


def test_a_stored_module_is_resolved_without_tensorflow(store: Store) -> None:
    code = (
        f"import sys; from hubbeam.modules.store import Store; s = Store({store.root!r});"
        f"m = s.resolve({NAME!r}, offline=True); s.verify({NAME!r}); print(s.local_folder(m));"
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_changed_folder_is_another_module(original: Path, tmp_path: Path) -> None:
    folder = tmp_path / "some_net"
    shutil.copytree(original, folder)
    store = Store(tmp_path / "store")
    first = store.resolve(str(folder))
    assert first.name == "some_net" and first.handle == str(folder)
    assert store.resolve(str(folder), offline=True) == first
    (folder / "hubbeam.json").write_text('{"untrained": true}')
    second = store.resolve(str(folder))
    assert second.sha256 != first.sha256
    assert store.get(str(folder)).entry.info.notes == {"untrained": True}
    assert (store.local_folder(first) / "saved_model.pb").is_file()  # jobs that run keep theirs
    shutil.rmtree(folder)
    assert store.resolve(str(folder), offline=True) == second


def test_what_is_no_module_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty holds no module"):
        store.resolve(str(tmp_path / "empty"))
    (tmp_path / "empty" / "saved_model.pb").write_bytes(b"\xff" * 10)
    with pytest.raises(ConfigError, match="cannot be read"):
        store.resolve(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="no module is named 'nope'"):
        store.resolve("nope")
    assert not store.handles()


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"image_size": 160}, "image_size 160x160, but the module has 224x224"),
        ({"width": 1024}, "width 1024, but the module has 1280"),
        ({"signature": "features"}, "no signature 'features'; it has: default, image_feature"),
    ],
)
def test_a_module_that_is_not_as_described_is_refused(
    original: Path, tmp_path: Path, changes: dict[str, Any], fault: str
) -> None:
    store = Store(tmp_path / "store")
    with pytest.raises(ConfigError, match=fault):
        store.resolve(_spec(tmp_path, str(original), **changes))
    assert not store.handles()
    assert store.resolve(_spec(tmp_path, str(original))).name == "mine"


# Damage.


@pytest.fixture
def own(store: Store, tmp_path: Path) -> Store:
    """A store to damage."""
    shutil.copytree(store.root, tmp_path / "own")
    return Store(tmp_path / "own")


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_changed_file_is_refused_by_name(own: Store) -> None:
    module = own.resolve(NAME)
    _flip(Path(module.entry) / "module" / "variables" / "variables.data-00000-of-00001")
    for load in (
        lambda: own.resolve(NAME),
        lambda: own.local_folder(module),
        lambda: own.verify(NAME),
    ):
        with pytest.raises(ConfigError, match=r"050_224-.* is damaged: variables/variables\.data"):
            load()


def test_missing_and_foreign_files_are_refused(own: Store) -> None:
    module = own.resolve(NAME)
    folder = Path(module.entry) / "module"
    (folder / "tfhub_module.pb").rename(folder / "other.pb")
    with pytest.raises(ConfigError, match=r"tfhub_module\.pb is missing; other\.pb is not part"):
        own.resolve(NAME)


def test_a_changed_entry_json_is_refused(own: Store) -> None:
    file = Path(own.resolve(NAME).entry) / "entry.json"
    entry = json.loads(file.read_text())
    entry["sha256"] = "0" * 64
    file.write_text(json.dumps(entry))
    with pytest.raises(ConfigError, match=r"entry\.json is changed"):
        own.resolve(NAME)
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"entry\.json is not readable"):
        own.resolve(NAME)


def test_a_damaged_entry_is_mended_by_adding_it_again(own: Store, original: Path) -> None:
    module = own.resolve(NAME)
    _flip(Path(module.entry) / "module" / "saved_model.pb")
    assert own.add(original, NAME) == module
    assert own.resolve(NAME) == module


def test_leftovers_of_killed_processes_are_swept(own: Store, original: Path) -> None:
    old, young = Path(own.root, ".staging-old"), Path(own.root, ".staging-young")
    old.mkdir()
    young.mkdir()
    os.utime(old, (0, 0))
    own.add(original, NAME)
    assert not old.exists() and young.exists()


# HTTP.


def test_tf_hubs_compressed_protocol(server: Server, packed: bytes, tmp_path: Path) -> None:
    server.files["/google/net/feature_vector/1"] = packed
    told: list[tuple[str, int, int | None]] = []
    store = Store(tmp_path)
    module = store.resolve(
        f"{server.url}/google/net/feature_vector/1", progress=lambda *a: told.append(a)
    )
    assert module.name == "net"
    assert server.asked == ["/google/net/feature_vector/1?tf-hub-format=compressed"]
    assert told[-1][1:] == (len(packed), len(packed))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    server.close()
    assert store.resolve(module.handle) == module


def test_a_damaged_entry_is_fetched_again(server: Server, packed: bytes, tmp_path: Path) -> None:
    server.files["/net.tar.gz"] = packed
    store, url = Store(tmp_path), f"{server.url}/net.tar.gz"
    module, fetched = store.fetch(url)
    assert fetched and store.fetch(url) == (module, False)
    _flip(Path(module.entry) / "module" / "saved_model.pb")
    with pytest.raises(ConfigError, match=f"`hubbeam modules fetch {url}` fetches"):
        store.resolve(url)
    assert store.fetch(url) == (module, True)
    assert store.resolve(url) == module


def test_mirrors_are_tried_in_order(server: Server, packed: bytes, tmp_path: Path) -> None:
    server.files["/b.tar.gz"] = b"<!DOCTYPE html><title>Log in</title>"
    server.files["/c.tar.gz"] = packed
    mirrors = [f"{server.url}/b.tar.gz", f"{server.url}/c.tar.gz"]
    wanted = _spec(tmp_path, f"{server.url}/a/1", mirrors=mirrors)
    module = Store(tmp_path / "store").resolve(wanted)
    assert [a.partition("?")[0] for a in server.asked] == ["/a/1", "/b.tar.gz", "/c.tar.gz"]
    entry = Store(tmp_path / "store").get(wanted).entry
    assert entry.source == mirrors[1] and module.handle == f"{server.url}/a/1"
    mirrors.pop()
    with pytest.raises(ConfigError, match=r"(?s)/a/1\S+ could not.*HTTP 404.*web page came"):
        Store(tmp_path / "other").resolve(_spec(tmp_path, f"{server.url}/a/1", mirrors=mirrors))


def test_a_module_in_a_folder_of_the_archive(
    server: Server, original: Path, tmp_path: Path
) -> None:
    files = {f"net/{p.relative_to(original)}": p.read_bytes() for p in original.rglob("*.*")}
    server.files["/net.tar.gz"] = _tar(files)
    assert Store(tmp_path).resolve(f"{server.url}/net.tar.gz").width == 1280
    server.files["/none.tar.gz"] = _tar({"readme": b"hello"})
    with pytest.raises(ConfigError, match="there is no module in the archive"):
        Store(tmp_path).resolve(f"{server.url}/none.tar.gz")


@pytest.mark.parametrize("faults", [["busy"], ["busy", "busy"], ["cut"]])
def test_downloads_are_tried_again(server: Server, tmp_path: Path, faults: list[str]) -> None:
    server.files["/a.tar.gz"] = os.urandom(1 << 20)
    server.faults["/a.tar.gz"] = [*faults]
    download(f"{server.url}/a.tar.gz", tmp_path / "a", backoff=0.01)
    assert (tmp_path / "a").read_bytes() == server.files["/a.tar.gz"]
    assert len(server.asked) == len(faults) + 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [("busy", "busy or failing"), ("cut", "the answer ends early"), ("stall", "no answer in time")],
)
def test_downloads_give_up(server: Server, tmp_path: Path, fault: str, message: str) -> None:
    server.files["/a.tar.gz"] = b"x" * 1000
    server.faults["/a.tar.gz"] = [fault] * 9
    with pytest.raises(RunError, match=message):
        download(
            f"{server.url}/a.tar.gz", tmp_path / "a", timeout=(5, 0.2), attempts=2, backoff=0.01
        )
    assert len(server.asked) == 2
    assert not (tmp_path / "a").exists()


def test_downloads_have_a_limit(server: Server, tmp_path: Path) -> None:
    server.files["/a.tar.gz"] = b"x" * 1000
    with pytest.raises(RunError, match="1000 bytes, more than 999"):
        download(f"{server.url}/a.tar.gz", tmp_path / "a", max_bytes=999)


def test_two_processes_may_fetch_at_once(server: Server, packed: bytes, tmp_path: Path) -> None:
    server.files["/net.tar.gz"] = packed
    code = (
        "from hubbeam.modules.store import Store;"
        f"print(Store({str(tmp_path)!r}).resolve('{server.url}/net.tar.gz').sha256)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)
    ]
    printed = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    module = Store(tmp_path).resolve(f"{server.url}/net.tar.gz", offline=True)
    assert printed == {f"{module.sha256}\n".encode()}
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["handles", Path(module.entry).name]
    )


# Archives that mean harm.


def _member(name: str, kind: bytes, target: str = "") -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        tar.addfile(member)
    return data.getvalue()


@pytest.mark.parametrize(
    ("archive", "fault"),
    [
        (_tar({"../evil": b"x"}), r"'\.\./evil' leaves its folder"),
        (_tar({"a/../../evil": b"x"}), "leaves its folder"),
        (_tar({"/evil": b"x"}), "absolute"),
        (_tar({"C:\\evil": b"x"}), "absolute"),
        (_member("a", tarfile.SYMTYPE, "/etc"), "is a link"),
        (_member("a", tarfile.SYMTYPE, "b"), "is a link"),
        (_member("a", tarfile.LNKTYPE, "../b"), "is a link"),
        (_member("a", tarfile.CHRTYPE), "no plain file"),
        (_member("a", tarfile.FIFOTYPE), "no plain file"),
        (_tar({"big": b"0" * 200_000}), "more than 100000 bytes"),
        (_tar({str(i): b"" for i in range(21)}), "more than 20 entries"),
        (_tar({"a": os.urandom(50_000)})[:30_000], "damaged"),
        (_tar({"a": os.urandom(50_000)}, "w:xz")[:30_000], "damaged"),
        (_tar({"a": os.urandom(50_000)}, "w")[:30_000], "damaged"),
        (b"nothing of the kind", "damaged or none"),
        (b"", "damaged or none"),
    ],
    # An archive holds the time at which it was made: as a name it would differ between processes.
    ids=lambda value: value if isinstance(value, str) else "archive",
)
def test_archives_are_not_trusted(tmp_path: Path, archive: bytes, fault: str) -> None:
    folder = tmp_path / "to" / "here"
    folder.mkdir(parents=True)
    (tmp_path / "archive").write_bytes(archive)
    with pytest.raises(RunError, match=fault):
        unpack(tmp_path / "archive", folder, max_bytes=100_000, max_files=20)
    outside = {p.name for p in tmp_path.rglob("*")} - {"to", "here", "archive"}
    assert outside <= {"a", *map(str, range(21))}
    assert not Path("/evil").exists()


def test_bits_in_the_middle_of_an_archive(tmp_path: Path) -> None:
    data = bytearray(_tar({"a": b"some text " * 10_000, "b": b"y" * 50_000}))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "archive").write_bytes(data)
    with pytest.raises(RunError, match="damaged"):
        unpack(tmp_path / "archive", tmp_path)


def test_an_evil_archive_leaves_no_entry(server: Server, tmp_path: Path) -> None:
    server.files["/net.tar.gz"] = _tar({"saved_model.pb": b"", "../../evil": b"x"})
    with pytest.raises(ConfigError, match=r"'\.\./\.\./evil' leaves its folder"):
        Store(tmp_path / "a" / "b").resolve(f"{server.url}/net.tar.gz")
    assert [*tmp_path.rglob("*")] == [tmp_path / "a", tmp_path / "a" / "b"]


# Without a network.


def test_offline_tells_how_to_get_the_module(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Store(tmp_path).resolve("nasnet_mobile", offline=True)
    message = str(caught.value)
    assert "hubbeam modules fetch nasnet_mobile --store DIR" in message
    assert "imagenet/nasnet_mobile/feature_vector/1.tar.gz as FILE.tar.gz" in message
    assert "hubbeam modules fetch nasnet_mobile --from FILE.tar.gz" in message
    assert "models/nasnet-a_mobile_04_10_2017.tar.gz" in message
    assert "hubbeam modules build nasnet_mobile --checkpoint" in message


def test_an_archive_on_this_machine(packed: bytes, tmp_path: Path) -> None:
    archive = tmp_path / "net.tar.gz"
    archive.write_bytes(packed)
    store = Store(tmp_path / "store")
    module = store.resolve(str(archive), offline=True)
    assert (module.name, module.width) == ("net", 1280)
    assert store.add(archive, NAME).sha256 == module.sha256
    assert store.resolve(NAME, offline=True).name == NAME
    archive.write_bytes(packed[:1000])
    with pytest.raises(ConfigError, match="damaged"):
        store.resolve(str(archive))


def test_tensorflow_hubs_own_cache(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    handle = load_spec(NAME).handle
    shutil.copytree(original, tmp_path / "hub" / hashlib.sha1(handle.encode()).hexdigest())
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "hub"))
    assert Store(tmp_path / "store").resolve(NAME, offline=True).name == NAME


def test_a_resolver_registered_with_tensorflow_hub(original: Path, tmp_path: Path) -> None:
    from tensorflow_hub import registry

    class Own:
        def is_supported(self, handle: str) -> bool:
            return handle.startswith("own://")

        def __call__(self, handle: str) -> str:
            return str(original)

    registry.resolver.add_implementation(Own())
    assert Store(tmp_path).resolve("own://net/1").name == "net"
    with pytest.raises(ConfigError, match="other://net/1 is unknown to tensorflow_hub"):
        Store(tmp_path).resolve("other://net/1")


# Artifacts.


def test_artifacts(own: Store) -> None:
    module = own.resolve(NAME)
    assert own.get_artifact(module, "choice.json") is None
    own.put_artifact(module, "choice.json", b"1")
    own.put_artifact(module, "choice.json", b"2")
    assert own.get_artifact(module, "choice.json") == b"2"
    assert own.resolve(NAME) == module  # they are not part of the module
    with pytest.raises(ValueError, match="artifact name"):
        own.put_artifact(module, "../module/saved_model.pb", b"")


# Google Cloud Storage.


def test_a_store_on_gcs(
    gcs_bucket: str, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hubbeam.modules.files import write

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = Store(f"{gcs_bucket}/store/")
    module = store.add(original, NAME)
    assert module.entry == f"{gcs_bucket}/store/{NAME}-{module.sha256[:12]}"
    assert store.resolve(NAME, offline=True) == module
    assert store.verify(NAME).entry.sha256 == module.sha256
    assert store.handles() == [load_spec(NAME).handle]

    copy = store.local_folder(module)
    data = (original / "saved_model.pb").read_bytes()
    assert copy.is_relative_to(tmp_path) and (copy / "saved_model.pb").read_bytes() == data
    _flip(copy / "saved_model.pb")  # it is only a copy: it is made again
    assert (store.local_folder(module) / "saved_model.pb").read_bytes() == data

    store.put_artifact(module, "a.bin", b"1")
    assert store.get_artifact(module, "a.bin") == b"1"

    shutil.rmtree(tmp_path / "hubbeam")
    write(f"{module.entry}/module/saved_model.pb", data[:-1] + b"!")
    for load in (lambda: store.verify(NAME), lambda: store.local_folder(module)):
        with pytest.raises(ConfigError, match=r"saved_model\.pb is changed"):
            load()
    write(f"{module.entry}/module/saved_model.pb", b"")
    with pytest.raises(ConfigError, match=r"saved_model\.pb is missing or changed"):
        store.resolve(NAME)
    assert store.add(original, NAME) == module
    assert store.resolve(NAME) == module


def test_handles_on_gcs(gcs_bucket: str, original: Path, packed: bytes, tmp_path: Path) -> None:
    from hubbeam.modules.files import upload_gcs, write

    for file in original.rglob("*"):
        if file.is_file():
            upload_gcs(file, f"{gcs_bucket}/nets/one/{file.relative_to(original)}")
    write(f"{gcs_bucket}/nets/two.tar.gz", packed)
    store = Store(tmp_path)
    one, two = (
        store.resolve(f"{gcs_bucket}/nets/one/"),
        store.resolve(f"{gcs_bucket}/nets/two.tar.gz"),
    )
    assert (one.name, two.name) == ("one", "two")
    assert one.sha256 == two.sha256
    with pytest.raises(ConfigError, match=r"nets/none holds no module"):
        store.resolve(f"{gcs_bucket}/nets/none")
