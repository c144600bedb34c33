"""What a module is, as data: its YAML description, what is found inside it, and its pinned form."""

from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hubbeam.modules.errors import ConfigError

FEATURES = "image_feature_vector"
CLASSES = "image_classification"


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NetworkSpec(_Data):
    """Which of our networks rebuilds the module, and with which arguments."""

    builder: Literal["mobilenet_v1", "mobilenet_v2", "inception_v2", "nasnet_mobile"]
    args: dict[str, Any] = Field(default_factory=dict)


class CheckpointSpec(_Data):
    """The TF-Slim checkpoint that a module was exported from.

    Attributes:
      url: where TF-Slim publishes it, a ``.tgz`` or ``.tar.gz``.
      mirrors: other places of the same archive, tried in order.
      prefix: name of the checkpoint inside the archive, without ``.index``.
    """

    url: str
    mirrors: tuple[str, ...] = ()
    prefix: str


class ModuleSpec(_Data):
    """One ``configs/modules/*.yaml``: what a published module says about itself.

    Attributes:
      name: the dataset folder's name, and what ``--module`` takes.
      handle: where the module is published, as its users know it.
      mirrors: other places of the same module, tried in order after the handle.
      image_size: height and width in pixels of the module's square input.
      colour_range: smallest and largest value of a pixel channel in the input.
      dtype: type of the input and of the vectors.
      signature: signature that gives the feature vector.
      width: values in a feature vector.
      classes: logits of ``image_classification``, None where the module has no such signature.
      tag_sets: tag sets of its graphs.
      fine_tunable: whether it has a graph for training.
      quantops: whether its graph holds fake-quantisation ops.
      licence: SPDX name.
      source: page that documents the module.
      checkpoint: TF-Slim checkpoint that it was exported from.
      sibling: handle of its classification module, or of its feature-vector module.
      network: how it is rebuilt.
      description: one line for ``modules list``.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    handle: str
    mirrors: tuple[str, ...] = ()
    image_size: int = Field(gt=0)
    colour_range: tuple[float, float] = (0.0, 1.0)
    dtype: Literal["float32"] = "float32"
    signature: str = FEATURES
    width: int = Field(gt=0)
    classes: int | None = Field(default=None, gt=0)
    tag_sets: tuple[tuple[str, ...], ...] = ((),)
    fine_tunable: bool = False
    quantops: bool = False
    licence: str = ""
    source: str = ""
    checkpoint: CheckpointSpec | None = None
    sibling: str | None = None
    network: NetworkSpec | None = None
    description: str = ""

    def expected_width(self, signature: str) -> int | None:
        """Returns the width that `signature` must have, None when the spec does not say."""
        return {self.signature: self.width, CLASSES: self.classes}.get(signature)


class TensorInfo(_Data):
    """Type and shape of a signature's input or output; shape is None when the rank is unknown."""

    dtype: str
    shape: tuple[int | None, ...] | None

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.dtype} of unknown shape"
        return f"{self.dtype} [{', '.join('?' if n is None else str(n) for n in self.shape)}]"


class SignatureInfo(_Data):
    """Named inputs and outputs of one signature."""

    inputs: dict[str, TensorInfo]
    outputs: dict[str, TensorInfo]


class ModuleInfo(_Data):
    """What is found inside a module's folder.

    Attributes:
      format: ``hub1`` (TF1 Hub format) or ``tf2`` (TF2 SavedModel).
      tag_sets: tag sets of its graphs.
      signatures: signatures of the inference graph.
      image_size: height and width it expects, None where the module does not say.
      parameters: trainable values, None where they cannot be counted.
      variables: number of variables, None where they cannot be counted.
      size_bytes: bytes of all files.
      fine_tunable: whether it has a graph for training.
      notes: content of the ``hubbeam.json`` that our builder leaves (``{"untrained": true}``).
    """

    format: Literal["hub1", "tf2"]
    tag_sets: tuple[tuple[str, ...], ...]
    signatures: dict[str, SignatureInfo]
    image_size: tuple[int, int] | None
    parameters: int | None
    variables: int | None
    size_bytes: int
    fine_tunable: bool
    notes: dict[str, Any] = Field(default_factory=dict)


class ResolvedModule(_Data):
    """A module pinned by its content: all a worker needs to run it. JSON-able.

    Attributes:
      name: the dataset folder's name.
      handle: what it was fetched from.
      sha256: hash over the sorted paths and sha256s of its files.
      entry: local path or ``gs://`` of its store entry.
      format: ``hub1`` or ``tf2``.
      tags: tag set of the graph to load; empty for a TF1 Hub module.
      signature: signature to call.
      input: key of the signature's image input.
      output: key of the signature's output that is the vector.
      image_size: height and width of the input.
      width: values in a vector.
      untrained: whether it says of itself that its values are random.
    """

    name: str
    handle: str
    sha256: str
    entry: str
    format: Literal["hub1", "tf2"]
    tags: tuple[str, ...]
    signature: str
    input: str = "images"
    output: str
    image_size: tuple[int, int]
    width: int
    untrained: bool = False


def spec_names() -> list[str]:
    """Returns the names of the modules that hubbeam describes, sorted."""
    folder = resources.files("hubbeam.configs") / "modules"
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".yaml"))


def load_spec(name_or_path: str) -> ModuleSpec:
    """Reads a module's description.

    Args:
      name_or_path: one of `spec_names`, or the path of a YAML file.

    Returns:
      The checked description. In a YAML file of the user's own, a handle or mirror that starts with
      ``./`` or ``../`` is a folder beside that file.

    Raises:
      ConfigError: no such name or file, or a key that is unknown, missing or of the wrong type.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path).expanduser()
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"module description {name_or_path} cannot be read: {e}") from e
        return _parse(text, name_or_path, path.resolve().parent)
    if name_or_path not in spec_names():
        raise ConfigError(
            f"no module is named {name_or_path!r}; there are {', '.join(spec_names())}. "
            "A YAML file, URL, gs:// path or folder may be given instead"
        )
    file = resources.files("hubbeam.configs") / "modules" / f"{name_or_path}.yaml"
    return _parse(file.read_text(encoding="utf-8"), name_or_path, None)


def _parse(text: str, where: str, folder: Path | None) -> ModuleSpec:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ConfigError(f"module description {where} is not YAML: {e}") from e
    if not isinstance(data, dict):
        raise ConfigError(f"module description {where} must hold `key: value` lines")
    try:
        spec = ModuleSpec.model_validate(data)
    except ValidationError as e:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in e.errors()
        )
        raise ConfigError(f"module description {where}: {faults}") from e
    if folder is None:
        return spec
    return spec.model_copy(
        update={
            "handle": _beside(spec.handle, folder),
            "mirrors": tuple(_beside(m, folder) for m in spec.mirrors),
        }
    )


def _beside(handle: str, folder: Path) -> str:
    return str((folder / handle).resolve()) if handle.startswith(("./", "../")) else handle
