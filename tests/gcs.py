"""A Google Cloud Storage emulator on loopback; the fixture `gcs_bucket` runs this file.

Its first line of output is its port. Everything that clients need is set by environment
variables (`environment`), so that processes which a test starts use it too:

* ``STORAGE_EMULATOR_HOST``: google-cloud-storage, and so Beam's ``gs://``, talks to it.
* ``GOOGLE_APPLICATION_CREDENTIALS``: a throw-away service account whose token comes from the
  emulator. Without credentials Beam 2.77 asks the (absent) metadata server for twenty seconds
  before it goes on anonymously.
* ``CLOUD_STORAGE_EMULATOR_ENDPOINT``: the C++ client inside `pyarrow.fs.GcsFileSystem`. Tried with
  pyarrow 25: write, read, list, copy, move and delete_file work, also with ``#``, brackets and
  spaces in names, with no arguments (the service account serves), with ``anonymous=True``, and with
  ``endpoint_override="127.0.0.1:port", scheme="http"``. delete_dir deletes the files, then fails
  because there is no marker object for the folder.

The emulator is a process of its own and has threads: in the process of the tests, pyarrow's
open_input_file hung.

Uploads to names that end in ``.refused`` fail with 403.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlparse

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage


@contextmanager
def running(folder: Path) -> Iterator[dict[str, str]]:
    """Runs the emulator.

    Args:
      folder: an existing folder for its log and the service account.

    Yields:
      The environment variables of its clients.
    """
    with (folder / "emulator.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, __file__], stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"no emulator: {(folder / 'emulator.log').read_text()}")
        address = f"http://127.0.0.1:{int(line)}"
        account = folder / "account.json"
        _write_account(account, f"{address}/token")
        yield {
            "STORAGE_EMULATOR_HOST": address,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": address,
            "GOOGLE_APPLICATION_CREDENTIALS": str(account),
            "GOOGLE_CLOUD_PROJECT": "emulated",
        }
    finally:
        process.terminate()
        process.wait(10)


def make_bucket() -> str:
    """Makes a new, empty bucket: ``gs://name``."""
    from google.cloud import storage

    name = f"bucket-{os.urandom(4).hex()}"
    storage.Client().create_bucket(name)
    return f"gs://{name}"


def _write_account(path: Path, token_uri: str) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    account = {
        "type": "service_account",
        "project_id": "emulated",
        "private_key_id": "1",
        "private_key": pem.decode(),
        "client_email": "test@emulated.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": token_uri,
    }
    path.write_text(json.dumps(account))


class _Handler(RequestHandler):
    """The emulator's handler, with a token service, and names to which uploads fail."""

    def do_POST(self) -> None:  # noqa: N802
        if self.path != "/token":
            super().do_POST()
            return
        token = {"access_token": "emulated", "expires_in": 3600, "token_type": "Bearer"}
        self._answer(200, json.dumps(token).encode())

    def do_PUT(self) -> None:  # noqa: N802
        upload = parse_qs(urlparse(self.path).query).get("upload_id", [""])[0]
        if ".refused:" not in upload:  # bucket:name:time
            super().do_PUT()
            return
        self._answer(403, b"{}")

    def _answer(self, status: int, body: bytes) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _quote_media_links() -> None:
    # The emulator (2026.7) gives download links in which "#" and "?" of an object's name are not
    # escaped, unlike the real service: such objects could not be read.
    make = objects._make_object_resource

    def quoted(base_url: str, bucket: str, name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        resource = make(base_url, bucket, name, *args, **kwargs)
        resource["mediaLink"] = resource["mediaLink"].replace(
            f"/o/{name}?generation", f"/o/{quote(name, safe='')}?generation"
        )
        return resource

    objects._make_object_resource = quoted


def _main() -> None:
    _quote_media_links()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, Storage(use_memory_fs=True)))
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    _main()
