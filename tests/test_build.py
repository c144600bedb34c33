"""Built modules beside the original one, and in the hands of those who load them."""

import functools
import hashlib
import http.server
import json
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_hub as hub
from tensorflow.core.framework import variable_pb2
from tensorflow.core.protobuf import saved_model_pb2

from hubbeam.modules.build import build_module, network_of, untrained_values
from hubbeam.modules.errors import ConfigError, RunError
from hubbeam.modules.inspect import ATTACHMENTS, inspect_module
from hubbeam.modules.spec import CheckpointSpec, ModuleSpec, NetworkSpec, load_spec

FORMATS = ("hub1", "tf2")
# sha256 over all values of `SMALL`, untrained, in the order of their names.
UNTRAINED = "802dbf6fc0d29dda33ef31958f8b323ddfead8d8dfb47eff40421ffafa5ef1e2"
SMALL = ModuleSpec(
    name="small",
    handle="./small",
    image_size=64,
    width=1280,
    fine_tunable=True,
    network=NetworkSpec(builder="mobilenet_v2", args={"depth_multiplier": 0.35}),
)


@pytest.fixture(scope="module")
def rebuilt(original: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """mobilenet_v2_050_224 built from the original module's own variables, in both formats."""
    folder = tmp_path_factory.mktemp("rebuilt")
    spec = load_spec("mobilenet_v2_050_224")
    variables = original / "variables" / "variables"
    return {f: build_module(spec, folder / f, checkpoint=variables, format=f) for f in FORMATS}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small untrained network without a classifier, in both formats."""
    folder = tmp_path_factory.mktemp("small")
    return {f: build_module(SMALL, folder / f, format=f, untrained=True) for f in FORMATS}


def meta_graphs(folder: Path) -> dict[tuple[str, ...], Any]:
    saved_model = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    return {tuple(m.meta_info_def.tags): m for m in saved_model.meta_graphs}


def signatures(meta_graph: Any) -> dict[str, Any]:
    def tensors(found: Any) -> dict[str, tuple[int, list[int]]]:
        return {k: (t.dtype, [d.size for d in t.tensor_shape.dim]) for k, t in found.items()}

    return {
        name: (tensors(s.inputs), tensors(s.outputs), s.method_name)
        for name, s in meta_graph.signature_def.items()
    }


def collected_variables(meta_graph: Any, collection: str) -> list[str]:
    return [
        variable_pb2.VariableDef.FromString(data).variable_name
        for data in meta_graph.collection_def[collection].bytes_list.value
    ]


def run(folder: Path, images: np.ndarray, tags: list[str] | None = None) -> dict[str, np.ndarray]:
    call = hub.load(str(folder), tags=tags).signatures["image_feature_vector"]
    return {k: v.numpy() for k, v in call(images=tf.constant(images)).items()}


def pictures(count: int, size: int) -> np.ndarray:
    coarse = np.random.default_rng(count).random((count, 4, 4, 3), np.float32)
    return tf.image.resize(coarse, (size, size)).numpy()


def test_the_format_is_the_originals(original: Path, rebuilt: dict[str, Path]) -> None:
    ours, theirs = meta_graphs(rebuilt["hub1"]), meta_graphs(original)
    assert list(ours) == list(theirs) == [(), ("train",)]
    for tags in theirs:
        assert signatures(ours[tags]) == signatures(theirs[tags])
        for collection in ("variables", "model_variables", "trainable_variables"):
            found = collected_variables(ours[tags], collection)
            assert sorted(found) == sorted(collected_variables(theirs[tags], collection))
        for collection in ("regularization_losses", "update_ops"):
            found = ours[tags].collection_def[collection].node_list.value
            expected = theirs[tags].collection_def[collection].node_list.value
            assert len(found) == len(expected)
        operations = [{n.op for n in graphs[tags].graph_def.node} for graphs in (ours, theirs)]
        assert {"VarHandleOp", "AssignVariableOp", "ReadVariableOp", "L2Loss"} <= operations[0]
        assert not {op for op in operations[0] if "Variable" in op} - operations[1]
    mark = (original / "tfhub_module.pb").read_bytes()
    assert (rebuilt["hub1"] / "tfhub_module.pb").read_bytes() == mark
    stored = [
        tf.train.list_variables(str(f / "variables/variables")) for f in (original, rebuilt["hub1"])
    ]
    assert stored[0] == stored[1]


def test_rebuilt_equals_the_original(
    original: Path, rebuilt: dict[str, Path], shared: Path
) -> None:
    expected = np.load(shared / "modules" / "mobilenet_v2_050_224_expected.npz")
    images = expected["images"] / np.float32(255)
    theirs = run(original, images)
    np.testing.assert_allclose(theirs["default"], expected["features"], atol=1e-4)
    for form in FORMATS:
        ours = run(rebuilt[form], images)
        assert ours.keys() == theirs.keys()
        for name, values in theirs.items():
            np.testing.assert_allclose(ours[name], values, rtol=1e-5, atol=1e-4, err_msg=name)


def test_training_graph_equals_the_originals(original: Path, rebuilt: dict[str, Path]) -> None:
    images = pictures(4, 224)
    ours, theirs = run(rebuilt["hub1"], images, ["train"]), run(original, images, ["train"])
    inference = run(original, images)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        # Batch statistics divide by small variances: rounding shows a little more.
        np.testing.assert_allclose(ours[name], values, rtol=1e-3, atol=1e-3, err_msg=name)
    assert np.abs(theirs["default"] - inference["default"]).max() > 0.1
    module = hub.load(str(rebuilt["tf2"]))
    features = module(tf.constant(images), training=True)
    np.testing.assert_allclose(features, theirs["default"], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(
        tf.add_n([loss() for loss in module.regularization_losses]),
        regularization(original),
        rtol=1e-5,
    )
    assert regularization(rebuilt["hub1"]) == pytest.approx(regularization(original), rel=1e-5)


def regularization(folder: Path) -> float:
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.compat.v1.saved_model.load(session, ["train"], str(folder))
        return float(session.run(tf.compat.v1.losses.get_regularization_loss()))


@pytest.mark.parametrize("form", FORMATS)
def test_the_module_tells_its_image_size(form: str, small: dict[str, Path]) -> None:
    info = inspect_module(small[form])
    assert info.image_size == (64, 64)
    assert info.fine_tunable
    assert info.parameters == sum(
        np.prod(s.shape, dtype=int) for s in network_of(SMALL).variables.values() if s.trainable
    )
    if form == "hub1":
        assert info.tag_sets == ((), ("train",))
        for graph in meta_graphs(small[form]).values():
            [attached] = graph.collection_def[ATTACHMENTS].bytes_list.value
            # ModuleAttachment{key, value = ImageModuleInfo{InputSize{64, 64}}} on the wire
            assert attached == b"\n\x11image_module_info\x12\x06\n\x04\x08\x40\x10\x40"


def check_moved(names: list[str], before: list[np.ndarray], after: list[np.ndarray]) -> None:
    """All weights and statistics have moved.

    A beta or gamma need not: what it shifts or scales, the next batch norm may take off again.
    """
    fixed = {n for n, b, a in zip(names, before, after, strict=True) if np.array_equal(a, b)}
    assert not {n for n in fixed if not n.endswith(("/beta:0", "/gamma:0"))}
    assert len(fixed) < 50


def test_training_through_the_hub1_graph(small: dict[str, Path]) -> None:
    images, targets = pictures(8, 64), np.eye(2, dtype=np.float32)[[0, 1] * 4]
    with tf.Graph().as_default() as graph, tf.compat.v1.Session() as session:
        loaded = tf.compat.v1.saved_model.load(session, ["train"], str(small["hub1"]))
        signature = loaded.signature_def["default"]
        images_in = graph.get_tensor_by_name(signature.inputs["images"].name)
        features = graph.get_tensor_by_name(signature.outputs["default"].name)
        weights = tf.compat.v1.get_variable("weights", initializer=np.zeros((1280, 2), np.float32))
        logits = tf.matmul(features, weights)
        entropy = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(targets, logits))
        loss = entropy + tf.compat.v1.losses.get_regularization_loss()
        updates = tf.compat.v1.get_collection(tf.compat.v1.GraphKeys.UPDATE_OPS)
        trained = tf.compat.v1.trainable_variables()
        step = tf.compat.v1.train.GradientDescentOptimizer(0.001).minimize(loss, var_list=trained)
        session.run(weights.initializer)
        statistics = [v for v in tf.compat.v1.global_variables() if "/moving_" in v.name]
        before = session.run([*trained, *statistics])
        losses = [session.run((loss, step, updates), {images_in: images})[0] for _ in range(8)]
        after = session.run([*trained, *statistics])
    assert losses[-1] < losses[0] - 0.02
    assert len(statistics) == 104
    names = [v.name for v in (*trained, *statistics)]
    check_moved(names, before, after)


def test_inference_graph_stays_fixed(small: dict[str, Path]) -> None:
    images = pictures(4, 64)
    for form in FORMATS:
        module = hub.load(str(small[form]))
        before = [v.numpy() for v in module.variables]
        call = module.signatures["default"]
        first = call(images=tf.constant(images))["default"]
        alone = call(images=tf.constant(images[:1]))["default"]
        for was, now in zip(before, module.variables, strict=True):
            np.testing.assert_array_equal(now, was)
        np.testing.assert_allclose(alone, first[:1], rtol=1e-4, atol=1e-5)
        graph = module.signatures["default"].graph
        assert "AssignSubVariableOp" not in {op.type for op in graph.get_operations()}


def test_keras_layer_trains_the_tf2_form(small: dict[str, Path]) -> None:
    import tf_keras

    layer = hub.KerasLayer(str(small["tf2"]), trainable=True)
    model = tf_keras.Sequential([tf_keras.Input((64, 64, 3)), layer])
    model.add(tf_keras.layers.Dense(2, kernel_initializer="zeros"))
    model.compile(
        tf_keras.optimizers.SGD(0.001),
        tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    images, labels = pictures(8, 64), np.array([0, 1] * 4)
    assert len(layer.trainable_weights) == 156
    assert len(layer.non_trainable_weights) == 104
    assert len(layer.losses) == 1
    before = [v.numpy() for v in layer.weights]
    fixed = model.predict(images, verbose=0)
    history = model.fit(images, labels, epochs=8, batch_size=8, verbose=0).history["loss"]
    assert history[-1] < history[0] - 0.02
    check_moved([v.name for v in layer.weights], before, [v.numpy() for v in layer.weights])
    assert (model.predict(images, verbose=0) != fixed).any()

    frozen = hub.KerasLayer(str(small["tf2"]), trainable=False)
    before = [v.numpy() for v in frozen.weights]
    frozen(tf.constant(images), training=True)
    assert frozen.trainable_weights == []
    for was, now in zip(before, frozen.weights, strict=True):
        np.testing.assert_array_equal(now, was)


@pytest.mark.parametrize("form", FORMATS)
def test_a_checkpoint_with_a_classifier(form: str, shared: Path, tmp_path: Path) -> None:
    folder = shared / "checkpoints" / "inception_v2"
    spec = load_spec("inception_v2")
    if form == "tf2":  # as its sibling, the classification module
        spec = spec.model_copy(update={"classes": 1001})
    build_module(spec, tmp_path / "m", checkpoint=folder / "model.ckpt", format=form)  # type: ignore[arg-type]
    expected = np.load(folder / "expected.npz")
    images = tf.constant(expected["images"] / np.float32(255))
    module = hub.load(str(tmp_path / "m"))
    main = "features" if form == "hub1" else "logits"
    for name, key in (
        ("image_feature_vector", "features"),
        ("image_classification", "logits"),
        ("default", main),
    ):
        found = module.signatures[name](images=images)["default"]
        scale = np.abs(expected[key]).max()
        np.testing.assert_allclose(found, expected[key], rtol=1e-4, atol=1e-5 * scale)
    assert len(module.variables) == 277
    if form == "tf2":
        np.testing.assert_allclose(module(images), expected["logits"], rtol=1e-3, atol=1e-3)
        assert "InceptionV2/Logits/Conv2d_1c_1x1/weights:0" in {
            v.name for v in module.trainable_variables
        }


def test_nasnet_with_both_graphs(shared: Path, tmp_path: Path) -> None:
    folder = shared / "checkpoints" / "nasnet_mobile"
    build_module(load_spec("nasnet_mobile"), tmp_path / "m", checkpoint=folder / "model.ckpt")
    expected = np.load(folder / "expected.npz")
    module = hub.load(str(tmp_path / "m"))
    images = tf.constant(expected["images"] / np.float32(255))
    features = module.signatures["image_feature_vector"](images=images)
    np.testing.assert_allclose(features["default"], expected["features"], rtol=1e-4, atol=1e-4)
    assert features["Cell_11"].shape == (4, 7, 7, 1056)
    train = meta_graphs(tmp_path / "m")[("train",)]
    statistics = [n for n in collected_variables(train, "model_variables") if "/moving_" in n]
    assert len(train.collection_def["update_ops"].node_list.value) == len(statistics) > 300
    assert "RandomUniform" in {n.op for n in train.graph_def.node}  # the classifier's dropout


def test_features_alone_train_no_classifier(shared: Path, tmp_path: Path) -> None:
    checkpoint = shared / "checkpoints" / "mobilenet_v1_100_160" / "model.ckpt"
    spec = ModuleSpec(
        name="v1", handle="./v1", image_size=160, width=1024,
        network=NetworkSpec(builder="mobilenet_v1"),
    )  # fmt: skip
    build_module(spec, tmp_path / "m", checkpoint=checkpoint, format="tf2")
    module = hub.load(str(tmp_path / "m"))
    assert "image_classification" in module.signatures
    trained = {v.name for v in module.trainable_variables}
    assert len(trained) == 3 * 27
    assert not [name for name in trained if "Logits" in name]
    assert len(module.variables) == 137


def test_untrained_values_are_the_same_everywhere(small: dict[str, Path]) -> None:
    specs = network_of(SMALL).variables
    values = untrained_values(specs)
    digest = hashlib.sha256()
    for name in sorted(values):
        assert values[name].dtype == np.float32
        digest.update(values[name].tobytes())
    assert digest.hexdigest() == UNTRAINED
    backwards = untrained_values(dict(reversed(specs.items())))
    for name, value in values.items():
        np.testing.assert_array_equal(backwards[name], value)
    assert not np.array_equal(
        values["MobilenetV2/expanded_conv_8/expand/weights"],
        values["MobilenetV2/expanded_conv_9/expand/weights"],
    )
    for form in FORMATS:
        found = run(small[form], pictures(4, 64))
        for name, activations in found.items():
            assert np.isfinite(activations).all()
            assert 0.1 < activations.std() < 10, name
        assert np.abs(found["default"][0] - found["default"][1]).max() > 0.1
        notes = inspect_module(small[form]).notes
        assert notes["untrained"] is True
        assert notes["network"] == "mobilenet_v2"
        assert notes["args"] == {"depth_multiplier": 0.35}


def test_notes_name_the_checkpoint(rebuilt: dict[str, Path], original: Path) -> None:
    for form in FORMATS:
        notes = json.loads((rebuilt[form] / "hubbeam.json").read_text())
        assert notes["untrained"] is False
        assert notes["module"] == "mobilenet_v2_050_224"
        assert len(notes["checkpoint_sha256"]) == 64
        assert str(original) not in json.dumps(notes)  # whose machine it was is nobody's business


@pytest.mark.parametrize("form", FORMATS)
def test_quantops_has_the_inference_graph_only(form: str, tmp_path: Path) -> None:
    spec = load_spec("mobilenet_v1_100_160_quantops")
    folder = build_module(spec, tmp_path / "m", format=form, untrained=True)  # type: ignore[arg-type]
    info = inspect_module(folder)
    assert not info.fine_tunable
    assert set(info.signatures) == {"default", "image_feature_vector", "image_classification"}
    assert info.signatures["default"].outputs["default"].shape == (None, 1001)
    images = tf.constant(pictures(2, 160))
    if form == "hub1":
        assert info.tag_sets == ((),)
        with pytest.raises(Exception, match="'train' could not be found"):
            hub.load(str(folder), tags=["train"])
        features = hub.load(str(folder)).signatures["image_feature_vector"](images=images)
        assert np.isfinite(features["default"]).all()
    else:
        module = hub.load(str(folder))
        assert list(module.trainable_variables) == []
        assert module(images).shape == (2, 1001)
        with pytest.raises(tf.errors.InvalidArgumentError, match="the inference graph only"):
            module(images, training=True)


def test_the_checkpoint_is_fetched(tmp_path: Path) -> None:
    build_module(SMALL, tmp_path / "seed", untrained=True)
    (tmp_path / "www").mkdir()
    with tarfile.open(tmp_path / "www" / "small.tgz", "w:gz") as tar:
        for file in (tmp_path / "seed" / "variables").iterdir():
            tar.add(file, f"./{file.name.replace('variables', 'small.ckpt')}")
    handler = functools.partial(QuietHandler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        checkpoint = CheckpointSpec(
            url=f"{url}/none.tgz", mirrors=(f"{url}/small.tgz",), prefix="small.ckpt"
        )
        spec = SMALL.model_copy(update={"checkpoint": checkpoint})
        build_module(spec, tmp_path / "m")
        gone = checkpoint.model_copy(update={"mirrors": ()})
        with pytest.raises(RunError, match=r"/none\.tgz where there is a network, and give"):
            build_module(SMALL.model_copy(update={"checkpoint": gone}), tmp_path / "n")
        server.shutdown()
    notes = inspect_module(tmp_path / "m").notes
    archive = (tmp_path / "www" / "small.tgz").read_bytes()
    assert notes["checkpoint_sha256"] == hashlib.sha256(archive).hexdigest()
    assert notes["checkpoint"] == "small.tgz"
    images = pictures(2, 64)
    np.testing.assert_array_equal(
        run(tmp_path / "m", images)["default"], run(tmp_path / "seed", images)["default"]
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "seed", "www"]


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_what_cannot_be_built(tmp_path: Path, small: dict[str, Path]) -> None:
    variables = small["hub1"] / "variables" / "variables"
    with pytest.raises(ConfigError, match="is there already"):
        build_module(SMALL, small["hub1"], untrained=True)
    with pytest.raises(ConfigError, match="not both"):
        build_module(SMALL, tmp_path / "m", checkpoint=variables, untrained=True)
    with pytest.raises(ConfigError, match="names no checkpoint"):
        build_module(SMALL, tmp_path / "m")
    with pytest.raises(ConfigError, match="no `network`"):
        build_module(SMALL.model_copy(update={"network": None}), tmp_path / "m", untrained=True)
    wide = SMALL.model_copy(
        update={"network": NetworkSpec(builder="mobilenet_v2", args={"depth_multiplier": 0.5})}
    )
    with pytest.raises(ConfigError) as error:
        build_module(wide, tmp_path / "m", checkpoint=variables)
    assert "MobilenetV2/Conv_1/weights is [1, 1, 112, 1280], not [1, 1, 160, 1280]" in str(
        error.value
    )
    classes = SMALL.model_copy(update={"classes": 1001})
    with pytest.raises(ConfigError, match="Logits/Conv2d_1c_1x1/biases \\[1001\\] is missing"):
        build_module(classes, tmp_path / "m", checkpoint=variables)
    narrow = SMALL.model_copy(update={"width": 1024})
    with pytest.raises(ConfigError, match="1280 values wide, but its description says 1024"):
        build_module(narrow, tmp_path / "m", checkpoint=variables)
    assert list(tmp_path.iterdir()) == []
