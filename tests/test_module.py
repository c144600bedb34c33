"""Modules from Python: both formats, pictures of all kinds in, vectors out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hubbeam import Module
from hubbeam.modules.errors import ConfigError, ImageError
from hubbeam.modules.images import decode
from hubbeam.modules.inspect import inspect_module
from hubbeam.modules.presets import load_preset
from hubbeam.modules.store import Store
from hubbeam.modules.verify import compare_module, run_module

NAME = "mobilenet_v2_050_224"


@pytest.fixture(scope="module")
def module(store: Store) -> Module:
    return Module.load(NAME, store=store, engine="tensorflow")


@pytest.fixture(scope="module")
def expected(shared: Path) -> dict[str, np.ndarray]:
    with np.load(shared / "modules" / "mobilenet_v2_050_224_expected.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def tf2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TF2 SavedModel with one signature, 6x5 pictures and variables of its own."""
    import tensorflow as tf

    class Net(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = tf.Variable(np.arange(12, dtype=np.float32).reshape(3, 4))
            self.steps = tf.Variable(0, trainable=False)

        @tf.function(input_signature=[tf.TensorSpec([None, 6, 5, 3], tf.float32, "pictures")])
        def serve(self, pictures: Any) -> dict[str, Any]:
            return {"vectors": tf.reduce_mean(pictures, [1, 2]) @ self.kernel}

    net = Net()
    folder = tmp_path_factory.mktemp("tf2") / "tiny"
    tf.saved_model.save(net, str(folder), signatures=net.serve)
    return folder


def test_embed_gives_the_vectors_of_the_original(
    module: Module, expected: dict[str, np.ndarray]
) -> None:
    assert (module.name, module.image_size, module.width) == (NAME, (224, 224), 1280)
    vectors = module.embed(list(expected["images"]))
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected["features"], atol=2e-4)
    np.testing.assert_allclose(module.run(expected["images"]), vectors, atol=2e-4)


def test_embed_takes_files_bytes_and_arrays(module: Module, photos: Path) -> None:
    coffee, chelsea = photos / "coffee.jpg", photos / "chelsea.jpg"
    pixels = np.empty((224, 224, 3), np.uint8)
    decode(coffee.read_bytes(), load_preset("photo"), [pixels])
    vectors = module.embed(
        [coffee, str(chelsea), coffee.read_bytes(), pixels, pixels.astype(np.float64) / 255]
    )
    assert vectors.shape == (5, 1280)
    for same in (2, 3, 4):
        np.testing.assert_allclose(vectors[same], vectors[0], atol=1e-4)
    assert np.abs(vectors[1] - vectors[0]).max() > 0.1


def test_arrays_of_any_size_are_resized(module: Module, photos: Path) -> None:
    from PIL import Image

    picture = np.asarray(Image.open(photos / "chelsea.jpg").convert("RGB"))
    assert picture.shape[:2] != (224, 224)
    vectors = module.embed([photos / "chelsea.jpg", picture, picture / 255.0, picture[::-1]])
    np.testing.assert_allclose(vectors[1], vectors[0], atol=1e-3)
    np.testing.assert_allclose(vectors[2], vectors[1], atol=1e-4)
    assert np.abs(vectors[3] - vectors[0]).max() > 0.1


def test_order_and_number_survive_batching(module: Module, expected: dict[str, Any]) -> None:
    order = np.random.default_rng(0).integers(8, size=75)
    vectors = module.embed(expected["images"][i] for i in order)
    np.testing.assert_allclose(vectors, expected["features"][order], atol=2e-4)
    assert module.embed([]).shape == (0, 1280)


def test_a_bad_picture_is_named(module: Module, photos: Path, tmp_path: Path) -> None:
    good = photos / "coffee.jpg"
    page = tmp_path / "page.jpg"
    page.write_text("<html>")
    with pytest.raises(ImageError, match=r"page\.jpg") as caught:
        module.embed([good, page])
    assert caught.value.reason == "unsupported_format"
    with pytest.raises(ImageError, match=r"not_found: .*gone\.jpg"):
        module.embed([tmp_path / "gone.jpg"])
    with pytest.raises(ImageError, match="read_failed"):
        module.embed([tmp_path])
    with pytest.raises(ImageError, match="truncated: image 1"):
        module.embed([good, good.read_bytes()[:5000]])


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.int64),
        np.full((4, 4, 3), 255.0),
        np.full((4, 4, 3), np.nan),
    ],
)
def test_arrays_that_are_no_pictures(module: Module, array: np.ndarray) -> None:
    with pytest.raises(ImageError, match="corrupt: image 0"):
        module.embed([array])


def test_one_picture_is_no_list(module: Module) -> None:
    with pytest.raises(TypeError, match="a list of images"):
        module.embed("a.jpg")


def test_presets(store: Store, photos: Path) -> None:
    hub = Module.load(NAME, store=store.root, engine="tensorflow", preset="hub")
    pixels = np.empty((224, 224, 3), np.float32)
    decode((photos / "rocket.jpg").read_bytes(), load_preset("hub"), [pixels])
    vectors = hub.embed([photos / "rocket.jpg"])
    np.testing.assert_allclose(vectors, hub.run(pixels[None]), atol=1e-4)


def test_what_is_wrong_is_told_before_anything_loads(store: Store) -> None:
    with pytest.raises(ConfigError, match="no preset 'foto'"):
        Module.load(NAME, store=store, preset="foto")
    with pytest.raises(ConfigError, match="no signature 'image_classification'"):
        Module.load(NAME, store=store, signature="image_classification")
    with pytest.raises(ConfigError, match="no engine 'warp'"):
        Module.load(NAME, store=store, engine="warp")


def test_a_tf2_saved_model(tf2_folder: Path, tmp_path: Path) -> None:
    info = inspect_module(tf2_folder)
    assert (info.format, info.tag_sets) == ("tf2", (("serve",),))
    assert (info.image_size, info.parameters, info.fine_tunable) == ((6, 5), 12, True)
    module = Module.load(str(tf2_folder), store=tmp_path, engine="tensorflow")
    resolved = module.resolved
    assert (resolved.tags, resolved.signature) == (("serve",), "serving_default")
    assert (resolved.input, resolved.output) == ("pictures", "vectors")
    pixels = np.random.default_rng(0).integers(256, size=(3, 6, 5, 3)).astype(np.uint8)
    kernel = np.arange(12, dtype=np.float32).reshape(3, 4)
    wanted = (pixels / 255).mean((1, 2)) @ kernel
    np.testing.assert_allclose(module.embed(list(pixels)), wanted, rtol=1e-5)
    assert set(run_module(tf2_folder, info, pixels)) == {"vectors"}


def test_compare_module(original: Path, shared: Path, tmp_path: Path) -> None:
    file = shared / "modules" / "mobilenet_v2_050_224_expected.npz"
    compared = {c.output: c for c in compare_module(original, file)}
    assert set(compared) == {"features", "MobilenetV2/layer_7"}
    assert all(c.cosine > 0.99999 and c.difference < 1e-3 for c in compared.values())
    with np.load(file) as content:
        images, features = content["images"], content["features"]
    np.savez(tmp_path / "other.npz", images=images, features=features[::-1])
    (other,) = compare_module(original, tmp_path / "other.npz")
    assert other.cosine < 0.99 and other.difference > 0.1
    np.savez(tmp_path / "small.npz", images=images[:, :160, :160], features=features)
    with pytest.raises(ConfigError, match="224x224"):
        compare_module(original, tmp_path / "small.npz")
    np.savez(tmp_path / "none.npz", images=images)
    with pytest.raises(ConfigError, match="none of the module's outputs"):
        compare_module(original, tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(ConfigError, match="cannot be read"):
        compare_module(original, tmp_path / "text.npz")
