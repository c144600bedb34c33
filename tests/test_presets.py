import json

import numpy as np
import pydantic
import pytest

from hubbeam.modules.errors import ConfigError
from hubbeam.modules.presets import JpegScaling, Preset, load_preset, preset_names
from hubbeam.modules.spec import load_spec, spec_names


def test_shipped_presets():
    assert preset_names() == ["hub", "photo", "slim_eval"]
    for name in preset_names():
        preset = load_preset(name)
        assert preset.name == name
        assert preset.description
    assert load_preset("photo").dtype == np.uint8
    assert load_preset("hub").dtype == load_preset("slim_eval").dtype == np.float32


def test_stamp_tells_presets_apart():
    presets = [load_preset(name) for name in preset_names()]
    assert len({p.fingerprint for p in presets}) == 3
    for preset in presets:
        stamp = json.loads(json.dumps(preset.stamp()))
        assert stamp["fingerprint"] == preset.fingerprint
        assert stamp["jpeg_scaling"] == (
            {"factor": 2, "floor": 448} if preset.name == "photo" else None
        )


@pytest.mark.parametrize(
    "change",
    [
        {"exif_orientation": False},
        {"central_fraction": 0.9},
        {"jpeg_scaling": None},
        {"jpeg_scaling": JpegScaling(factor=3, floor=448)},
        {"jpeg_scaling": None, "resize": "bilinear"},
    ],
)
def test_fingerprint_follows_every_field(change):
    photo = load_preset("photo")
    assert photo.model_copy(update=change).fingerprint != photo.fingerprint


def test_fingerprint_ignores_wording():
    photo = load_preset("photo")
    assert photo.model_copy(update={"description": "x"}).fingerprint == photo.fingerprint


def test_own_preset_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\nexif_orientation: true\ncentral_fraction: 1\nresize: bilinear\n"
        "jpeg_scaling: null\n"
    )
    assert load_preset(str(file)).resize == "bilinear"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("name: mine\nsharpen: true\n", "sharpen"),
        ("name: mine\nresize: cubic\n", "resize"),
        ("name: [", "not valid YAML"),
        ("- 1\n", "file"),
        ("name: Mine Own\n", "name"),
        (
            "name: m\nexif_orientation: true\ncentral_fraction: 1\nresize: bilinear\n"
            "jpeg_scaling: {factor: 2, floor: 448}\n",
            "antialiased_bilinear",
        ),
    ],
)
def test_wrong_preset_files_are_refused_by_key(tmp_path, text, named):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=named):
        load_preset(str(file))


@pytest.mark.parametrize("name", ["phot", "missing.yaml"])
def test_missing_presets_are_refused(name):
    with pytest.raises(ConfigError, match=name):
        load_preset(name)


def test_presets_are_frozen():
    with pytest.raises(pydantic.ValidationError):
        load_preset("photo").name = "other"  # type: ignore[misc]
    assert isinstance(hash(load_preset("photo")), int)
    assert isinstance(load_preset("photo"), Preset)


@pytest.mark.parametrize(
    ("size", "target", "expected"),
    [
        ((375, 500), (224, 224), 1),
        ((895, 2000), (224, 224), 1),
        ((896, 2000), (224, 224), 2),
        ((896, 2000), (160, 160), 2),  # the floor: as for 224
        ((3000, 4000), (224, 224), 4),
        ((3000, 4000), (160, 160), 4),
        ((3000, 4000), (331, 331), 4),
        ((3000, 4000), (512, 512), 2),
        ((20000, 20000), (224, 224), 8),
        ((3000, 4000), (100, 900), 2),
    ],
)
def test_jpeg_scaling_rule(size, target, expected):
    scaling = load_preset("photo").jpeg_scaling
    assert scaling is not None
    scale = scaling.denominator(size, target)
    assert scale == expected
    assert scale == 1 or all(
        have / scale >= max(448, 2 * want) for have, want in zip(size, target, strict=True)
    )


def test_our_modules_share_one_scaled_decode():
    scaling = load_preset("photo").jpeg_scaling
    assert scaling is not None
    sizes = [load_spec(name).image_size for name in spec_names()]
    assert len(sizes) == 5
    assert scaling.floor >= scaling.factor * max(sizes)
