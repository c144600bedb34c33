"""TF-Slim checkpoints: found, opened and read by variable name."""

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hubbeam.modules.download import ARCHIVES, unpack
from hubbeam.modules.errors import ConfigError, RunError

EMA = "ExponentialMovingAverage"
_INDEX = ".index"


class Checkpoint:
    """An open checkpoint.

    Where the checkpoint also holds the moving average of a variable over the training steps
    (``NAME/ExponentialMovingAverage``), that is the value of NAME: TF-Slim evaluates its networks
    with the averages, and publishes accuracies of those.

    Attributes:
      where: what the user gave, for messages.
      sha256: of the archive; or, of a bare checkpoint, over its files' names and contents.
      shapes: shapes of all variables by name, without the averages.
    """

    def __init__(self, prefix: Path, where: str, sha256: str):
        """Opens the checkpoint `prefix`.

        Raises:
          ConfigError: it cannot be read.
        """
        import tensorflow as tf

        try:
            self._reader = tf.train.load_checkpoint(str(prefix))
            stored = self._reader.get_variable_to_shape_map()
        except (tf.errors.OpError, ValueError) as e:
            raise ConfigError(f"checkpoint {where} cannot be read: {e}") from e
        self.where = where
        self.sha256 = sha256
        self.shapes = {
            name: tuple(shape) for name, shape in stored.items() if not name.endswith(f"/{EMA}")
        }
        self._averaged = {
            name.removesuffix(f"/{EMA}"): tuple(shape)
            for name, shape in stored.items()
            if name.endswith(f"/{EMA}")
        }
        self.shapes.update(self._averaged)

    def read(self, wanted: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
        """Reads variables.

        Args:
          wanted: shapes by name.

        Returns:
          float32 arrays by name, in the order of `wanted`.

        Raises:
          ConfigError: variables are missing, of another shape or type; all of them are listed.
        """
        faults = []
        values = {}
        for name, shape in wanted.items():
            if name not in self.shapes:
                faults.append(f"{name} {list(shape)} is missing")
            elif self.shapes[name] != tuple(shape):
                faults.append(f"{name} is {list(self.shapes[name])}, not {list(shape)}")
            else:
                stored = f"{name}/{EMA}" if name in self._averaged else name
                values[name] = np.asarray(self._reader.get_tensor(stored))
                if values[name].dtype != np.float32:
                    faults.append(f"{name} is {values[name].dtype}, not float32")
        if faults:
            raise ConfigError(
                f"checkpoint {self.where} is not one of this network, "
                f"{len(faults)} of {len(wanted)} variables do not fit:\n  " + "\n  ".join(faults)
            )
        return values


@contextmanager
def open_checkpoint(path: str | Path, prefix: str | None = None) -> Iterator[Checkpoint]:
    """Opens a checkpoint, as it is or inside an archive.

    Args:
      path: checkpoint prefix (``…/model.ckpt``), its ``.index`` file, a folder with one checkpoint,
        or a ``.tgz``, ``.tar.gz`` or ``.tar`` with one.
      prefix: name of the checkpoint inside a folder or archive that has several.

    Yields:
      The open checkpoint; an archive stays unpacked (in a temporary folder) until the end.

    Raises:
      ConfigError: there is no such checkpoint, it is not clear which, or it cannot be read.
    """
    path = Path(path).expanduser()
    if path.is_file() and path.name.endswith(ARCHIVES):
        with tempfile.TemporaryDirectory(prefix="hubbeam-checkpoint-") as folder:
            try:
                unpack(path, Path(folder))
            except RunError as e:
                raise ConfigError(f"checkpoint {path}: {e}") from e
            yield Checkpoint(_find(Path(folder), prefix, str(path)), str(path), _sha256(path))
        return
    found = path if not path.is_dir() else _find(path, prefix, str(path))
    found = found.with_name(found.name.removesuffix(_INDEX))
    files = _files(found)
    if not files:
        raise ConfigError(
            f"there is no checkpoint {path}: give its prefix (the path up to {_INDEX!r}), "
            "its folder, or the .tgz"
        )
    listing = "".join(f"{_sha256(file)} {file.name}\n" for file in files)
    yield Checkpoint(found, str(path), hashlib.sha256(listing.encode()).hexdigest())


def _files(prefix: Path) -> list[Path]:
    if prefix.is_file():  # the oldest format is one file
        return [prefix]
    index = prefix.with_name(prefix.name + _INDEX)
    shards = sorted(prefix.parent.glob(f"{_escape(prefix.name)}.data-?????-of-?????"))
    return [index, *shards] if index.is_file() and shards else []


def _escape(name: str) -> str:
    import glob

    return glob.escape(name)


def _find(folder: Path, prefix: str | None, where: str) -> Path:
    found = {p.with_name(p.name.removesuffix(_INDEX)) for p in folder.rglob(f"*{_INDEX}")}
    found |= {p for p in folder.rglob("*.ckpt") if p.is_file()}
    named = {p for p in found if p.name == prefix} or found
    if len(named) == 1:
        return named.pop()
    if not found:
        raise ConfigError(f"there is no checkpoint in {where}")
    names = ", ".join(sorted(str(p.relative_to(folder)) for p in found))
    raise ConfigError(f"{where} holds several checkpoints: {names}; give the prefix of one")


def _sha256(file: Path) -> str:
    with file.open("rb") as f:
        digest: Any = hashlib.sha256()
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
