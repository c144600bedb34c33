"""The commands `hubbeam modules …`, run as a user runs them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from hubbeam.modules.errors import ConfigError, RunError
from hubbeam.modules.store import Store
from hubbeam.pipelines.modules_cli import app

NAME = "mobilenet_v2_050_224"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def out(*arguments: str | Path) -> str:
    result = run(*arguments)
    if result.exception:
        raise result.exception
    return result.stdout


@pytest.fixture
def own(store: Store, tmp_path: Path) -> Path:
    """A store to change."""
    shutil.copytree(store.root, tmp_path / "own")
    return tmp_path / "own"


def test_list(own: Path, original: Path, tmp_path: Path) -> None:
    other = tmp_path / "some_net"
    shutil.copytree(original, other)
    (other / "hubbeam.json").write_text('{"untrained": true}')
    Store(own).resolve(str(other))
    rows = {
        line.split()[0]: line.split()
        for line in out("list", "--store", own).splitlines()
        if line.strip()
    }
    assert rows[NAME][1:5] == ["224x224", "1280", "yes", "yes"]
    assert rows["mobilenet_v1_100_160_quantops"][1:5] == ["160x160", "1024", "no", "no"]
    assert rows[str(other)][-2:] == ["yes,", "UNTRAINED"]
    file = next(own.glob(f"{NAME}-*/module/saved_model.pb"))
    file.write_bytes(b"")
    assert "DAMAGED" in out("list", "--store", own)


def test_show_a_stored_module(store: Store) -> None:
    text = out("show", NAME, "--store", store.root)
    sha256 = store.get(NAME).entry.sha256
    for fact in (
        "TF1 Hub format",
        "{}, {train}",
        "224x224, float32 in [0, 1]",
        "classification/2",
        "checkpoints/mobilenet_v2_0.5_224.tgz",
        "687,680",
        "MobilenetV2/layer_15/depthwise_output",
        sha256,
    ):
        assert fact in text
    rows = [line.split() for line in text.splitlines()]
    assert ["fine-tuning", "yes"] in rows
    assert ["image_feature_vector", "in", "images", "float32", "[?,", "224,", "224,", "3]"] in rows
    assert ["image_feature_vector", "out", "default", "float32", "[?,", "1280]"] in rows


def test_show_a_folder(original: Path, tmp_path: Path) -> None:
    folder = tmp_path / "net"
    shutil.copytree(original, folder)
    (folder / "hubbeam.json").write_text(json.dumps({"untrained": True, "fine_tunable": False}))
    text = out("show", folder)
    assert str(folder) in text and "random values" in text
    assert ["fine-tuning", "no"] in [line.split() for line in text.splitlines()]


def test_show_what_is_not_there(tmp_path: Path) -> None:
    assert "no (" in out("show", "nasnet_mobile", "--store", tmp_path)
    with pytest.raises(ConfigError, match="no module is named 'nope'"):
        out("show", "nope", "--store", tmp_path)
    with pytest.raises(ConfigError, match=r"fetch https://example.org/a/1. gets it"):
        out("show", "https://example.org/a/1", "--store", tmp_path)


def test_fetch(own: Path, original: Path, tmp_path: Path) -> None:
    assert "already there" in out("fetch", NAME, "--store", own)
    assert ": fetched," in out("fetch", original, "--store", tmp_path / "new")
    assert "already there" in out("fetch", original, "--store", tmp_path / "new")
    assert "stored" in out("fetch", NAME, "--from", original, "--store", tmp_path / "new")
    assert Store(tmp_path / "new").resolve(NAME, offline=True).name == NAME
    with pytest.raises(ConfigError, match="one module at a time"):
        out("fetch", NAME, "inception_v2", "--from", original, "--store", own)
    with pytest.raises(ConfigError, match="image_size 160x160, but the module has 224x224"):
        out("fetch", "mobilenet_v2_050_160", "--from", original, "--store", own)


def test_verify(own: Path, original: Path, shared: Path, tmp_path: Path) -> None:
    expected = shared / "modules" / "mobilenet_v2_050_224_expected.npz"
    text = out("verify", NAME, "--store", own, "--against", expected)
    assert "4, all as recorded" in text and "1280 values" in text
    assert ["features", "1.0000000"] in [line.split()[:2] for line in text.splitlines()]
    assert "1280 values" in out("verify", original)
    with np.load(expected) as file:
        np.savez(tmp_path / "x.npz", images=file["images"], features=file["features"] + 1)
    with pytest.raises(RunError, match="differs from"):
        out("verify", original, "--against", tmp_path / "x.npz")
    next(own.glob(f"{NAME}-*/module/tfhub_module.pb")).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"tfhub_module\.pb is changed"):
        out("verify", NAME, "--store", own)
    with pytest.raises(ConfigError, match="fetch inception_v2` gets it"):
        out("verify", "inception_v2", "--store", own)


def test_build_show_store_and_convert(tmp_path: Path) -> None:
    made = tmp_path / "made"
    name = "mobilenet_v2_050_160"
    assert "untrained module" in out("build", name, "--untrained", "--output", made)
    text = out("show", made)
    assert "random values" in text and "{}, {train}" in text
    out("fetch", name, "--from", made, "--store", tmp_path / "store")
    assert "UNTRAINED" in out("list", "--store", tmp_path / "store")
    lite = tmp_path / "m.tflite"
    assert "operators" in out("to-tflite", name, "-o", lite, "--store", tmp_path / "store")
    assert lite.read_bytes()[4:8] == b"TFL3"


def test_build_needs_a_description(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no module is named 'nope'"):
        out("build", "nope", "--output", tmp_path / "x")
