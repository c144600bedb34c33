"""What a run is, as data: everything that a worker needs to compute one shard of it."""

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from hubbeam.modules.engines.base import EngineChoice
from hubbeam.modules.images import Limits
from hubbeam.modules.presets import Preset
from hubbeam.modules.spec import ResolvedModule
from hubbeam.transforms import files

Format = Literal["parquet", "tfrecord"]
Compression = Literal["none", "gzip"]

WORK_FOLDER = ".hubbeam"
"""Folder in the output that holds the plan, and what an unfinished run left."""

SUCCESS = "_SUCCESS"
RUN_FILE = "run.json"


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Meaning(_Data):
    """What decides the content of a dataset. Two runs that differ here are never mixed.

    Attributes:
      inputs: patterns, folders and files, as given.
      table: file that names the images, or None.
      uri_column: column of `table` with the uris, or None for its default.
      modules: the pinned modules, by name.
      preset: how a picture becomes the module's input.
      format: file format of the shards.
      compression: of TFRecord shards.
      limits: bytes and pixels that an image may have.
      images_per_shard: as asked for, None for the default.
      shards: as asked for, None for the default.
    """

    inputs: tuple[str, ...]
    table: str | None
    uri_column: str | None
    modules: tuple[ResolvedModule, ...]
    preset: Preset
    format: Format
    compression: Compression
    limits: Limits
    images_per_shard: int | None = None
    shards: int | None = None

    def identity(self) -> dict[str, Any]:
        """Returns the meaning as plain data, without the place of the modules' store."""
        data = self.model_dump(mode="json")
        for module in data["modules"]:
            del module["entry"]
        return data

    def differences(self, other: "Meaning") -> list[str]:
        """Lists, one line each, the settings in which `other` differs."""
        mine, theirs = self.identity(), other.identity()
        mine["modules"] = [f"{m['name']}@{m['sha256'][:12]}" for m in mine["modules"]]
        theirs["modules"] = [f"{m['name']}@{m['sha256'][:12]}" for m in theirs["modules"]]
        if self.preset.name != other.preset.name:
            mine["preset"], theirs["preset"] = self.preset.name, other.preset.name
        lines = [
            f"{key}: {json.dumps(mine[key])} there, {json.dumps(theirs[key])} here"
            for key in mine
            if mine[key] != theirs[key]
        ]
        if not lines and self.identity() != other.identity():
            lines = ["modules: another signature or output of the same modules"]
        return lines


class PlannedRun(_Data):
    """A plan on disk and the meaning it was made for; stands in the output as ``job.json``.

    Attributes:
      meaning: what is computed.
      images: images of the plan, duplicates dropped.
      size_bytes: their size together, where it is known.
      duplicates: names that were listed more than once and dropped.
      shards: shards of the plan.
      plan_sha256: hash of the plan's rows.
      replaces: whether the output held a finished run that this one takes the place of.
    """

    meaning: Meaning
    images: int
    size_bytes: int
    duplicates: int
    shards: int
    plan_sha256: str
    replaces: bool = False

    @property
    def plan_id(self) -> str:
        """Hash over the meaning and the plan, stamped into every shard."""
        text = json.dumps([self.meaning.identity(), self.plan_sha256], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def root(self, output: str) -> str:
        """Folder that shards are written to.

        It is the output itself, unless that still holds a finished run, which may not be touched
        before the new one is whole.
        """
        return files.join(output, WORK_FOLDER, "new") if self.replaces else output


class ExtractJob(_Data):
    """A planned run with everything operational: rides in the pipeline to the workers.

    Attributes:
      output: where the datasets are published.
      planned: the plan.
      engines: engine of each module, in the order of ``planned.meaning.modules``.
      store: root of the module store.
      batch_size: most images that are given to a module at once.
      max_reject_fraction: more rejects than this, and nothing is published.
      processes: worker processes that share a machine; 0 means one for each core.
      started: seconds since the epoch.
      progress: local folder for the launcher's progress bar, None on remote runners.
      options: the options of the run, for ``run.json``.
    """

    output: str
    planned: PlannedRun
    engines: tuple[EngineChoice, ...]
    store: str | None = None
    batch_size: int = 32
    max_reject_fraction: float = 0.1
    processes: int = 1
    started: float = 0.0
    progress: str | None = None
    options: dict[str, Any] = {}

    @property
    def modules(self) -> tuple[ResolvedModule, ...]:
        """The modules of the run."""
        return self.planned.meaning.modules

    @property
    def shards(self) -> int:
        """Shards of each dataset."""
        return self.planned.shards

    @property
    def work(self) -> str:
        """Folder of the plan."""
        return files.join(self.output, WORK_FOLDER)

    @property
    def plan(self) -> str:
        """Folder of the plan's Parquet files."""
        return files.join(self.work, "plan")

    @property
    def root(self) -> str:
        """Folder that shards are written to, see `PlannedRun.root`."""
        return self.planned.root(self.output)

    @property
    def moving(self) -> str:
        """File that says that shards are being moved from `root` to the output."""
        return files.join(self.work, "moving")

    def vectors_path(self, root: str, module: str, shard: int) -> str:
        """Path of a shard of vectors below `root`."""
        return files.join(root, module, self._file_name("vectors", shard, self._suffix))

    def rejects_path(self, root: str, shard: int) -> str:
        """Path of a shard's rejects below `root`."""
        return files.join(root, "rejects", self._file_name("rejects", shard, "parquet"))

    @property
    def _suffix(self) -> str:
        if self.planned.meaning.format == "parquet":
            return "parquet"
        return "tfrecord.gz" if self.planned.meaning.compression == "gzip" else "tfrecord"

    def _file_name(self, kind: str, shard: int, suffix: str) -> str:
        return f"{kind}-{shard:05d}-of-{self.shards:05d}.{suffix}"
