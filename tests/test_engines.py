"""Engines against TensorFlow: on the original module, and on a small TF2 SavedModel."""

import hashlib
import logging
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hubbeam.modules.engines import ENGINES, Engine, EngineChoice, choose_engine, load_engine
from hubbeam.modules.engines.base import COSINE_MIN, agreement, check_pictures
from hubbeam.modules.engines.openvino import Converted
from hubbeam.modules.errors import ConfigError, RunError
from hubbeam.modules.spec import ResolvedModule
from hubbeam.modules.store import Store

THREADS = 2
SMALL = ["tensorflow", "openvino"]


def pinned(engine: str, batch_size: int = 4, cpu: str = "another processor") -> EngineChoice:
    """Returns a choice as it comes from another machine."""
    return EngineChoice(
        engine=engine,
        version="0",
        precision="f32",
        batch_size=batch_size,
        streams=2,
        cosine_min=1.0,
        images_per_second=1.0,
        cpu=cpu,
        pinned=True,
        why="for a test",
        measured={},
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def small(store: Store, tmp_path_factory: pytest.TempPathFactory) -> ResolvedModule:
    """A TF2 SavedModel with every form of batch norm and slice; the second output is the vector."""
    import tensorflow as tf

    rng = np.random.default_rng(7)

    class Net(tf.Module):
        def __init__(self) -> None:
            super().__init__()

            def variable(*shape: int, low: float = -0.5, high: float = 0.5) -> tf.Variable:
                return tf.Variable(rng.uniform(low, high, shape).astype(np.float32))

            self.conv = variable(3, 3, 3, 8)
            self.depth = variable(3, 3, 8, 2)
            self.point = variable(1, 1, 16, 12)
            self.norms = [
                [variable(n, low=0.5), variable(n), variable(n), variable(n, low=0.5, high=2)]
                for n in (8, 16, 12, 12)
            ]

        def norm(self, x: "tf.Tensor", number: int) -> "tf.Tensor":
            gamma, beta, mean, variance = self.norms[number]
            return tf.compat.v1.nn.fused_batch_norm(
                x, gamma, beta, mean, variance, epsilon=0.01, is_training=False
            )[0]

        @tf.function(input_signature=[tf.TensorSpec([None, 40, 32, 3], tf.float32, "images")])
        def vectors(self, images: "tf.Tensor") -> dict[str, "tf.Tensor"]:
            x = tf.nn.conv2d(images * 2 - 1, self.conv, 2, "SAME")
            x = tf.nn.relu6(self.norm(x, 0))
            x = tf.pad(x, [[0, 0], [0, 1], [0, 1], [0, 0]])[:, 1:, 1:, :]
            x = tf.nn.depthwise_conv2d(x, self.depth, [1, 1, 1, 1], "SAME")
            x = tf.nn.relu6(self.norm(x, 1))
            x = tf.nn.conv2d(x, self.point, 1, "SAME")
            # Read twice: the first batch norm cannot be folded into the convolution.
            x = self.norm(x, 2) + 0.5 * self.norm(x + 0.25, 3)
            parts = [x[:, 2:, :, :], x[:, 3:], x[:, -5:], x[:, :-3], x[:, 1::2, 1:], x[:, 3]]
            means = [tf.reduce_mean(part, list(range(1, part.ndim - 1))) for part in parts]
            return {"another": images, "default": tf.add_n(means), "map": x}

    net = Net()
    folder = tmp_path_factory.mktemp("small")
    tf.saved_model.save(net, str(folder), signatures={"image_feature_vector": net.vectors})
    return store.resolve(str(folder))


@pytest.fixture(scope="module")
def expected(store: Store, small: ResolvedModule) -> np.ndarray:
    """What the signature itself gives for the built-in pictures."""
    import tensorflow as tf

    signature = tf.saved_model.load(str(store.local_folder(small))).signatures[small.signature]
    pictures = check_pictures(small.image_size).astype(np.float32) / 255
    return signature(images=tf.constant(pictures))["default"].numpy()


@pytest.fixture(scope="module", params=SMALL)
def engine(request: pytest.FixtureRequest, store: Store, small: ResolvedModule) -> Engine:
    return load_engine(store, small, pinned(request.param), threads=THREADS)


def pictures_for(module: ResolvedModule, n: int) -> np.ndarray:
    rng = np.random.default_rng(n)
    return rng.integers(0, 256, (n, *module.image_size, 3), dtype=np.uint8)


def artifact(store: Store, module: ResolvedModule, start: str) -> Path:
    [path] = Path(module.entry, "artifacts").glob(f"{start}*")
    return path


@pytest.fixture
def conversion(store: Store, small: ResolvedModule) -> Iterator[Path]:
    """The kept conversion; whatever a test does to it is undone."""
    load_engine(store, small, pinned("openvino"), threads=1)
    path = artifact(store, small, "openvino-")
    kept = path.read_bytes()
    yield path
    path.write_bytes(kept)


def spoil(path: Path) -> None:
    """Makes a whole conversion that computes something else."""
    converted = Converted.unpack(path.read_bytes())
    weights = np.frombuffer(converted.weights, np.float32).copy()
    weights[::7] *= 1.01
    path.write_bytes(converted._replace(weights=weights.tobytes()).pack())


@pytest.mark.parametrize("name", ["tensorflow", "openvino"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_original_module(shared: Path, store: Store, name: str, batch_size: int) -> None:
    original = store.resolve(str(shared / "modules" / "mobilenet_v2_050_224_feature_vector_1"))
    choice = pinned(name, batch_size)
    with np.load(shared / "modules" / "mobilenet_v2_050_224_expected.npz") as data:
        images, features = data["images"], data["features"]
    engine = load_engine(store, original, choice, threads=THREADS)
    for pixels in (images, images.astype(np.float32) / 255):
        vectors = engine.run(pixels)
        assert vectors.dtype == np.float32
        norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(features, axis=1)
        assert ((vectors * features).sum(axis=1) / norms).min() > COSINE_MIN
        assert np.abs(vectors - features).max() < 1e-3  # of values up to 5


def test_signature_of_a_tf2_module(
    engine: Engine, small: ResolvedModule, expected: np.ndarray
) -> None:
    pictures = check_pictures(small.image_size)
    scale = np.abs(expected).max()
    for pixels in (pictures, pictures.astype(np.float32) / 255):
        np.testing.assert_allclose(engine.run(pixels), expected, rtol=0, atol=1e-5 * scale)


def test_batch_norm_is_folded_where_it_can_be(store: Store, small: ResolvedModule) -> None:
    from hubbeam.modules.engines.tensorflow import freeze

    frozen = freeze(store.local_folder(small), small)
    ops = [node.op for node in frozen.graph_def.node]
    assert ops.count("BiasAdd") == 2
    assert ops.count("FusedBatchNormV3") == 2
    assert ops.count("Placeholder") == 1
    assert not {"VarHandleOp", "ReadVariableOp", "PartitionedCall"} & set(ops)


def test_only_openvinos_input_is_transposed(
    store: Store, small: ResolvedModule, conversion: Path
) -> None:
    from hubbeam.modules.engines.tensorflow import freeze

    graph = freeze(store.local_folder(small), small).graph_def
    slices = sum(node.op == "StridedSlice" for node in graph.node)
    xml = Converted.unpack(conversion.read_bytes()).xml
    # The two slices from somewhere to the end: pixels stay in OpenVINO's order around the first.
    assert (xml.count(b'type="Slice"'), xml.count(b'type="StridedSlice"')) == (2, slices - 2)
    assert xml.index(b'type="Slice"') < xml.rindex(b'type="GroupConvolution"')
    between = xml[xml.index(b'type="Convolution"') : xml.rindex(b'type="GroupConvolution"')]
    assert b'type="Transpose"' not in between


@pytest.mark.parametrize("n", [0, 1, 3, 4, 33])
def test_any_number_of_images(engine: Engine, small: ResolvedModule, n: int) -> None:
    pixels = pictures_for(small, n)
    vectors = engine.run(pixels)
    assert vectors.shape == (n, small.width)
    one_by_one = [engine.run(pixels[i : i + 1]) for i in range(n)]
    alone = np.concatenate([np.empty((0, small.width), np.float32), *one_by_one])
    np.testing.assert_allclose(vectors, alone, rtol=1e-5, atol=1e-5)
    every_other = engine.run(pixels[::2])  # not contiguous
    np.testing.assert_allclose(every_other, alone[::2], rtol=1e-5, atol=1e-5)
    pixels.flags.writeable = False
    np.testing.assert_array_equal(engine.run(pixels), vectors)


def test_many_threads_at_once(engine: Engine, small: ResolvedModule) -> None:
    batches = [pictures_for(small, n) for n in range(1, 25)]
    batches += [batch.astype(np.float32) / 255 for batch in batches]
    alone = [engine.run(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:  # more than the engine has streams
        for _ in range(3):
            for vectors, wanted in zip(pool.map(engine.run, batches), alone, strict=True):
                np.testing.assert_allclose(vectors, wanted, rtol=1e-5, atol=1e-5)


def test_bad_pixels_stay_alone(engine: Engine, small: ResolvedModule) -> None:
    pixels = pictures_for(small, 7).astype(np.float32) / 255
    wanted = engine.run(pixels)
    pixels[2] = np.nan
    pixels[5] = np.inf
    vectors = engine.run(pixels)
    good = [0, 1, 3, 4, 6]
    np.testing.assert_allclose(vectors[good], wanted[good], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((1, 40, 32, 3), np.float64),
        np.zeros((1, 32, 40, 3), np.uint8),
        np.zeros((40, 32, 3), np.uint8),
        np.zeros((1, 40, 32, 4), np.uint8),
    ],
)
def test_other_pixels_are_refused(engine: Engine, pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="pixels must"):
        engine.run(pixels)


def test_auto_takes_the_fastest_that_agrees(
    store: Store, small: ResolvedModule, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hubbeam")
    choice = choose_engine(store, small, threads=THREADS)
    assert "comparing engines" in caplog.text
    assert set(choice.measured) == {"tensorflow", "openvino"}  # bf16 is not even tried
    assert choice.engine == max(choice.measured, key=lambda name: choice.measured[name])
    assert choice.precision == "f32"
    assert choice.cosine_min >= COSINE_MIN
    assert choice.streams == THREADS
    assert not choice.pinned
    engine = load_engine(store, small, choice, threads=3)
    assert (engine.name, engine.version) == (choice.engine, choice.version)
    assert (engine.batch_size, engine.streams) == (choice.batch_size, 3)
    caplog.clear()
    assert choose_engine(store, small, threads=THREADS) == choice
    assert not caplog.text


def test_damaged_choice_is_made_again(
    store: Store, small: ResolvedModule, caplog: pytest.LogCaptureFixture
) -> None:
    choose_engine(store, small, "openvino", threads=1)
    path = artifact(store, small, "engine-openvino-")
    path.write_bytes(path.read_bytes()[:20])
    assert choose_engine(store, small, "openvino", threads=1).engine == "openvino"
    assert "damaged" in caplog.text
    EngineChoice.model_validate_json(path.read_bytes())


def test_converted_module_needs_no_tensorflow(store: Store, small: ResolvedModule) -> None:
    choose_engine(store, small, "openvino", threads=THREADS)
    pixels = check_pictures(small.image_size)
    script = f"""
import sys
from hubbeam.modules.engines import choose_engine, load_engine
from hubbeam.modules.engines.base import check_pictures
from hubbeam.modules.spec import ResolvedModule
from hubbeam.modules.store import Store

def loaded():
    return [m for m in ("tensorflow", "openvino", "apache_beam.ml", "tf_keras") if m in sys.modules]

assert not loaded(), loaded()
store = Store({store.root!r})
module = ResolvedModule.model_validate_json({small.model_dump_json()!r})
choice = choose_engine(store, module, "openvino", threads={THREADS})
engine = load_engine(store, module, choice, threads={THREADS})
sys.stdout.buffer.write(engine.run(check_pictures(module.image_size)).tobytes())
assert loaded() == ["openvino"], loaded()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""
    vectors = np.frombuffer(done.stdout, np.float32).reshape(len(pixels), small.width)
    engine = load_engine(store, small, pinned("tensorflow"), threads=1)
    assert agreement(vectors, engine.run(pixels)) >= COSINE_MIN


def test_tensorflow_is_quiet(store: Store, small: ResolvedModule) -> None:
    script = f"""
import sys
from hubbeam.modules.engines.tensorflow import TensorFlowEngine
from hubbeam.modules.spec import ResolvedModule
from hubbeam.modules.store import Store

module = ResolvedModule.model_validate_json({small.model_dump_json()!r})
TensorFlowEngine(Store({store.root!r}).local_folder(module), module)
print("still heard", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"still heard\n")


def test_choice_from_another_processor_is_checked(
    store: Store, small: ResolvedModule, conversion: Path
) -> None:
    elsewhere = pinned("openvino", batch_size=2)
    assert load_engine(store, small, elsewhere, threads=1).batch_size == 2
    spoil(conversion)
    with pytest.raises(RunError, match=r"does not agree with TensorFlow.*cosine 0\.9"):
        load_engine(store, small, elsewhere, threads=1)


def test_auto_falls_back_to_tensorflow(
    store: Store,
    small: ResolvedModule,
    conversion: Path,
    expected: np.ndarray,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spoil(conversion)
    chosen = pinned("openvino").model_copy(update={"pinned": False})
    engine = load_engine(store, small, chosen, threads=1)
    assert engine.name == "tensorflow"
    assert "TensorFlow is used instead" in caplog.text
    assert agreement(engine.run(check_pictures(small.image_size)), expected) >= COSINE_MIN


def test_disagreement_is_never_chosen(
    store: Store, small: ResolvedModule, conversion: Path
) -> None:
    spoil(conversion)
    with pytest.raises(RunError, match=r"does not agree with TensorFlow.*cosine 0\.9"):
        choose_engine(store, small, "openvino", threads=5)
    choice = choose_engine(store, small, "auto", threads=5)
    assert choice.engine == "tensorflow"
    assert set(choice.measured) == {"tensorflow"}
    assert "does not agree" in choice.why


def test_damaged_conversion_is_made_again(
    store: Store, small: ResolvedModule, conversion: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = conversion.read_bytes()
    damaged = bytearray(good)
    damaged[len(damaged) // 2] ^= 0xFF
    conversion.write_bytes(damaged)
    engine = load_engine(store, small, pinned("openvino"), threads=1)
    assert engine.name == "openvino"
    assert "is damaged" in caplog.text
    assert Converted.unpack(conversion.read_bytes()).weights == Converted.unpack(good).weights


def test_store_that_cannot_be_written(
    store: Store,
    small: ResolvedModule,
    conversion: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Permissions do not stop a test that runs as root: a file where the folder should be does.
    folder = conversion.parent
    aside = folder.with_name("aside")
    folder.rename(aside)
    folder.write_bytes(b"")
    try:
        engine = load_engine(store, small, pinned("openvino"), threads=1)
    finally:
        folder.unlink()
        aside.rename(folder)
    assert engine.name == "openvino"
    assert "is not kept" in caplog.text


def test_store_in_the_cloud(
    store: Store, small: ResolvedModule, conversion: Path, gcs_bucket: str
) -> None:
    cloud = Store(f"{gcs_bucket}/store")
    module = cloud.resolve(str(store.local_folder(small)))
    choice = choose_engine(cloud, module, "openvino", threads=THREADS)
    kept = cloud.get_artifact(module, conversion.name)
    assert kept is not None
    assert Converted.unpack(kept).reference.shape == (6, small.width)
    assert choose_engine(cloud, module, "openvino", threads=THREADS) == choice
    engine = load_engine(cloud, module, choice, threads=THREADS)
    here = load_engine(store, small, choice, threads=THREADS)
    pixels = pictures_for(small, 5)
    np.testing.assert_array_equal(engine.run(pixels), here.run(pixels))


def test_bf16_only_by_name_and_with_its_cost(store: Store, small: ResolvedModule) -> None:
    choice = choose_engine(store, small, "openvino-bf16", threads=1)
    assert (choice.engine, choice.precision) == ("openvino-bf16", "bf16")
    assert f"cosine {choice.cosine_min:.5f}" in choice.why
    assert load_engine(store, small, choice, threads=1).name == "openvino-bf16"


def test_unknown_engine(store: Store, small: ResolvedModule) -> None:
    with pytest.raises(ConfigError, match=r"no engine 'tensorrt'; there are auto, tensorflow"):
        choose_engine(store, small, "tensorrt", threads=1)
    assert "auto" in ENGINES


def test_openvino_is_not_installed(
    store: Store,
    small: ResolvedModule,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ConfigError, match=r"pip install 'hubbeam\[openvino\]'"):
        choose_engine(store, small, "openvino", threads=1)
    with pytest.raises(ConfigError, match=r"pip install 'hubbeam\[openvino\]'"):
        load_engine(store, small, pinned("openvino"), threads=1)
    chosen = pinned("openvino").model_copy(update={"pinned": False})
    assert load_engine(store, small, chosen, threads=1).name == "tensorflow"


@pytest.mark.parametrize("name", ["tensorflow", "openvino"])
def test_output_that_is_not_there(store: Store, small: ResolvedModule, name: str) -> None:
    other = small.model_copy(update={"output": "nothing"})
    with pytest.raises(ConfigError, match="has no output 'nothing'; it has another, default, map"):
        load_engine(store, other, pinned(name), threads=1)


def test_check_pictures_are_always_the_same() -> None:
    pictures = check_pictures((224, 224))
    assert pictures.shape == (6, 224, 224, 3)
    assert pictures.dtype == np.uint8
    digest = hashlib.sha256(pictures.tobytes()).hexdigest()
    assert digest == "b4e07a2570a72777f2c0bb5ee6cabc5c243cbec6fc8787edf45295bf9b4c3743"


def test_agreement() -> None:
    vectors = np.array([[3, 4, 0], [0, 0, 0]], np.float32)
    assert agreement(vectors, vectors) == 1.0
    assert agreement(2 * vectors, vectors) == pytest.approx(0.8)  # same direction, other length
    assert agreement(vectors + np.float32([[0, 0, 1], [0, 0, 0]]), vectors) == pytest.approx(
        50 / 51
    )
    assert agreement(vectors + np.float32([[0, 0, 0], [0, 0, 1]]), vectors) == 0.0
    assert agreement(vectors * np.nan, vectors) == 0.0
    assert agreement(vectors[:1], vectors) == 0.0


def test_import_is_light() -> None:
    script = (
        "import sys, hubbeam.modules.engines; "
        "assert not {'tensorflow', 'openvino'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
