"""The settings of a job: from a YAML file, from flags, checked by one model."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, ValidationError

from hubbeam.modules.errors import ConfigError
from hubbeam.modules.images import Limits


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Strings = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class ExtractOptions(BaseModel):
    """What ``hubbeam extract`` does; the keys of a job file and the long names of the flags.

    Attributes:
      inputs: files, folders and globs, on any Beam filesystem.
      table: Parquet, CSV or text file that names the images.
      uri_column: column of `table` with the uris.
      modules: names, YAML files or handles.
      signature: signature of the modules to call; their own choice where it is None.
      output: folder of the datasets, on any Beam filesystem.
      format: file format of the shards.
      compression: of TFRecord shards.
      preset: how a picture becomes the module's input.
      engine: what runs the graphs.
      batch_size: most images that are given to a module at once.
      images_per_shard: images in a shard, about.
      shards: shards of each dataset.
      max_bytes: larger files are rejected.
      max_pixels: larger pictures are rejected before they are decoded.
      max_reject_fraction: with more rejects than this nothing is published.
      overwrite: replace a finished dataset in `output`, once the new one is whole.
      store: folder of the resolved modules.
      runner: Beam runner; ``local`` is Beam's in-memory FnApiRunner.
      workers: worker processes (``local``), or most workers (other runners).
      project: Google Cloud project.
      region: Google Cloud region.
      temp_location: folder for Beam's temporary files.
      beam: further options for Beam, as on its command line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: Strings = ()
    table: str | None = None
    uri_column: str | None = None
    modules: Strings = Field(default=(), validate_default=False)
    signature: str | None = None
    output: str = ""
    format: Literal["parquet", "tfrecord"] = "parquet"
    compression: Literal["none", "gzip"] = "none"
    preset: str = "photo"
    engine: str = "auto"
    batch_size: int = Field(default=32, ge=1, le=4096)
    images_per_shard: int | None = Field(default=None, ge=1)
    shards: int | None = Field(default=None, ge=1, le=99_999)
    max_bytes: ByteSize = Field(default=ByteSize(Limits().max_bytes), ge=1)
    max_pixels: int = Field(default=Limits().max_pixels, ge=1)
    max_reject_fraction: float = Field(default=0.1, ge=0, le=1)
    overwrite: bool = False
    store: str | None = None
    runner: str = "local"
    workers: int | None = Field(default=None, ge=1)
    project: str | None = None
    region: str | None = None
    temp_location: str | None = None
    beam: Strings = ()


def load_options(config: str | None, flags: dict[str, Any]) -> ExtractOptions:
    """Puts a job file and flags together; a flag overrides the file.

    Args:
      config: path of a YAML file with keys of `ExtractOptions`, or None.
      flags: values by key; None means that the flag was not given.

    Raises:
      ConfigError: names each unknown key, wrong value or missing setting.
    """
    values = _read_config(config) if config else {}
    where = config or "command line"
    given = {key: value for key, value in flags.items() if value is not None}
    if {"inputs", "table"} & given.keys():
        # What to read is one decision: a flag replaces all that the file says of it.
        values = {k: v for k, v in values.items() if k not in ("inputs", "table", "uri_column")}
    if {"shards", "images_per_shard"} & given.keys():
        values = {k: v for k, v in values.items() if k not in ("shards", "images_per_shard")}
    if "beam" in given and "beam" in values:
        given["beam"] = (*_as_tuple(values["beam"]), *given["beam"])
    try:
        options = ExtractOptions.model_validate({**values, **given})
    except ValidationError as error:
        faults = "; ".join(_fault(fault) for fault in error.errors())
        raise ConfigError(f"{where}: {faults}") from error
    _check(options, where)
    return options


def _fault(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"]) or "file"
    if fault["type"] == "extra_forbidden":
        return f"{key}: no such setting (there are: {', '.join(ExtractOptions.model_fields)})"
    return f"{key}: {fault['msg']}, got {fault['input']!r}"


def _read_config(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold settings, one `key: value` a line")
    return values


def _check(options: ExtractOptions, where: str) -> None:
    if not options.inputs and not options.table:
        raise ConfigError(f"{where}: no images: name files, folders or globs, or --table")
    if options.inputs and options.table:
        raise ConfigError(f"{where}: inputs and table exclude each other")
    if options.uri_column and not options.table:
        raise ConfigError(f"{where}: uri_column goes with table")
    if not options.modules:
        raise ConfigError(f"{where}: no module: name one with --module (hubbeam modules list)")
    if not options.output:
        raise ConfigError(f"{where}: no output: name a folder with --output")
    if options.shards and options.images_per_shard:
        raise ConfigError(f"{where}: shards and images_per_shard exclude each other")
    if options.compression != "none" and options.format != "tfrecord":
        raise ConfigError(f"{where}: compression goes with format: tfrecord")
