"""How a picture becomes the module's input, as data: the files in ``configs/presets``."""

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import yaml

from hubbeam.modules.errors import ConfigError

# Raised whenever the code below `decode` gives other pixels for the same preset: vectors of
# different versions must not share a dataset.
PIXELS_VERSION = 1


class JpegScaling(pydantic.BaseModel):
    """When a JPEG file may be decoded at a fraction of its size (libjpeg's scaled inverse DCT).

    The rule knows one module size at a time, so that a module's input never depends on which
    other modules run beside it.

    Attributes:
      factor: no decoded side is below this multiple of the module's side.
      floor: no decoded side is below this many pixels.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    factor: Annotated[int, pydantic.Field(ge=2, le=16)]
    floor: Annotated[int, pydantic.Field(ge=1, le=65535)]

    def denominator(self, size: tuple[int, int], target: tuple[int, int]) -> int:
        """Gives 8, 4, 2 or 1: the smallest decode that keeps the rule.

        Args:
          size: the file's (or its crop's) height and width in pixels, as stored.
          target: the module's height and width, in the same orientation.
        """
        sides = zip(size, target, strict=True)
        room = min(have // max(self.floor, self.factor * want) for have, want in sides)
        return next((scale for scale in (8, 4, 2) if scale <= room), 1)


class Preset(pydantic.BaseModel):
    """One way from a decoded picture to the module's input.

    Attributes:
      name: what users call it.
      description: one sentence for users.
      exif_orientation: whether the picture is turned upright first, as its EXIF data say.
      central_fraction: the part of each side that is kept, as in `tf.image.central_crop`.
      resize: ``antialiased_bilinear`` (Pillow's filter on 8 bits), ``bilinear``
        (`tf.image.resize`: half-pixel centres, no antialiasing) or ``legacy_bilinear``
        (`tf.compat.v1.image.resize_bilinear` with ``align_corners=False``).
      jpeg_scaling: when JPEG files may be decoded at a fraction of their size; None for never.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, pydantic.Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    description: str = ""
    exif_orientation: bool
    central_fraction: Annotated[float, pydantic.Field(gt=0, le=1)]
    resize: Literal["antialiased_bilinear", "bilinear", "legacy_bilinear"]
    jpeg_scaling: JpegScaling | None

    @pydantic.model_validator(mode="after")
    def _scaling_needs_antialias(self) -> "Preset":
        if self.jpeg_scaling is not None and self.resize != "antialiased_bilinear":
            raise ValueError("jpeg_scaling needs resize: antialiased_bilinear")
        return self

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the module's input: uint8 (0 to 255), or float32 (0 to 1)."""
        return np.dtype(np.uint8 if self.resize == "antialiased_bilinear" else np.float32)

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that differ whenever the pixels may differ."""
        data = self.model_dump(mode="json", exclude={"name", "description"})
        text = json.dumps({"pixels_version": PIXELS_VERSION, **data}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def stamp(self) -> dict[str, Any]:
        """What a shard's metadata say of the preset: its data and its fingerprint (JSON-able).

        Vectors belong together only where the fingerprints are equal, whatever the names.
        """
        return {
            **self.model_dump(mode="json"),
            "dtype": self.dtype.name,
            "pixels_version": PIXELS_VERSION,
            "fingerprint": self.fingerprint,
        }


def preset_names() -> list[str]:
    """Names the presets that come with the package, sorted."""
    folder = resources.files("hubbeam.configs") / "presets"
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml"))


def load_preset(name_or_path: str) -> Preset:
    """Loads a preset.

    Args:
      name_or_path: one of `preset_names`, or the path of a YAML file of the same shape.

    Raises:
      ConfigError: there is no such preset, or its file is not as it should be (each wrong key is
        named).
    """
    if name_or_path.endswith((".yaml", ".yml")):
        try:
            text = Path(name_or_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"preset {name_or_path}: cannot be read: {error}") from error
    elif name_or_path in preset_names():
        file = resources.files("hubbeam.configs") / "presets" / f"{name_or_path}.yaml"
        text = file.read_text(encoding="utf-8")
    else:
        raise ConfigError(
            f"no preset {name_or_path!r}: it is one of {', '.join(preset_names())}, "
            "or the path of a .yaml file"
        )
    try:
        return Preset.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"preset {name_or_path}: not valid YAML: {error}") from error
    except pydantic.ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()
        )
        raise ConfigError(f"preset {name_or_path}: {faults}") from error
