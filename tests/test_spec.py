"""Module descriptions: the five, YAML files of users, and what is wrong with them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hubbeam.modules.errors import ConfigError
from hubbeam.modules.inspect import choose
from hubbeam.modules.spec import (
    ModuleInfo,
    ResolvedModule,
    SignatureInfo,
    TensorInfo,
    load_spec,
    spec_names,
)

# Handle, input size, width, classes, can be fine-tuned: as the modules' pages say.
PUBLISHED = {
    "mobilenet_v2_050_224": ("mobilenet_v2_050_224/feature_vector/2", 224, 1280, None, True),
    "mobilenet_v2_050_160": ("mobilenet_v2_050_160/feature_vector/1", 160, 1280, None, True),
    "mobilenet_v1_100_160_quantops": (
        "mobilenet_v1_100_160/quantops/classification/1",
        160,
        1024,
        1001,
        False,
    ),
    "inception_v2": ("inception_v2/feature_vector/1", 224, 1024, None, True),
    "nasnet_mobile": ("nasnet_mobile/feature_vector/1", 224, 1056, None, True),
}


def test_the_five_modules_are_described_as_published() -> None:
    assert spec_names() == sorted(PUBLISHED)
    for name, (path, size, width, classes, tunable) in PUBLISHED.items():
        spec = load_spec(name)
        assert spec.name == name
        assert spec.handle == f"https://tfhub.dev/google/imagenet/{path}"
        assert (spec.image_size, spec.width, spec.classes) == (size, width, classes)
        assert spec.colour_range == (0, 1)
        assert spec.fine_tunable is tunable is (("train",) in spec.tag_sets)
        assert spec.licence == "Apache-2.0"
        assert spec.checkpoint and spec.network and spec.source
        kinds = ("feature_vector", "classification")
        this, other = kinds if "feature_vector" in path else kinds[::-1]
        assert spec.sibling == spec.handle.replace(this, other)


def test_the_published_archive_of_050_160_is_a_mirror() -> None:
    archive = "tfhub-modules/google/imagenet/mobilenet_v2_050_160/feature_vector/1.tar.gz"
    assert any(m.endswith(archive) for m in load_spec("mobilenet_v2_050_160").mirrors)


def test_an_unknown_name_tells_the_names() -> None:
    with pytest.raises(ConfigError, match=r"'resnet'.*inception_v2, .*nasnet_mobile"):
        load_spec("resnet")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("name: a\nhandle: b\nimage_size: 9\nwidth: 8\ncolor: 1", "color"),
        ("name: a\nhandle: b\nimage_size: big\nwidth: 8", "image_size"),
        ("name: a\nhandle: b\nimage_size: 9", "width"),
        ("name: a/b\nhandle: b\nimage_size: 9\nwidth: 8", "name"),
        ("name: [", "YAML"),
        ("- a", "key: value"),
    ],
)
def test_a_fault_in_a_yaml_file_is_named(tmp_path: Path, text: str, fault: str) -> None:
    file = tmp_path / "m.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=fault):
        load_spec(str(file))


def test_a_yaml_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml"):
        load_spec(str(tmp_path / "gone.yaml"))


def test_a_yaml_file_may_name_a_folder_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "m.yaml"
    file.write_text("name: mine\nhandle: ./module\nimage_size: 9\nwidth: 8")
    assert load_spec(str(file)).handle == str(tmp_path.resolve() / "module")


def test_a_resolved_module_rides_in_json() -> None:
    module = ResolvedModule(
        name="m",
        handle="h",
        sha256="0" * 64,
        entry="gs://b/m",
        format="tf2",
        tags=("serve",),
        signature="default",
        output="default",
        image_size=(8, 9),
        width=3,
    )
    assert ResolvedModule.model_validate(json.loads(module.model_dump_json())) == module


def _info(
    signatures: dict[str, tuple[dict[str, TensorInfo], dict[str, TensorInfo]]],
    size: tuple[int, int] | None = None,
) -> ModuleInfo:
    return ModuleInfo(
        format="tf2",
        tag_sets=(("serve",),),
        signatures={
            name: SignatureInfo(inputs=inputs, outputs=outputs)
            for name, (inputs, outputs) in signatures.items()
        },
        image_size=size,
        parameters=None,
        variables=None,
        size_bytes=0,
        fine_tunable=False,
    )


def _float(*shape: int | None) -> TensorInfo:
    return TensorInfo(dtype="float32", shape=shape)


IMAGES = {"images": _float(None, 9, 8, 3)}


def test_feature_vectors_are_preferred_to_default() -> None:
    logits = (IMAGES, {"default": _float(None, 1001)})
    features = (IMAGES, {"default": _float(None, 7), "layer": _float(None, 2, 2, 5)})
    info = _info(
        {"default": logits, "image_classification": logits, "image_feature_vector": features}
    )
    assert choose(info, None, "m") == ("image_feature_vector", "images", "default", (9, 8), 7)
    assert choose(info, "image_classification", "m").width == 1001
    assert choose(_info({"default": logits}), None, "m").signature == "default"


def test_a_single_input_and_output_may_have_any_name() -> None:
    info = _info({"serving_default": ({"x": _float(None, 4, 4, 3)}, {"y": _float(None, 5)})})
    assert choose(info, None, "m") == ("serving_default", "x", "y", (4, 4), 5)


def test_image_module_info_counts_where_the_signature_leaves_the_size_open() -> None:
    signature = ({"images": _float(None, None, None, 3)}, {"default": _float(None, 5)})
    assert choose(_info({"default": signature}, (64, 32)), None, "m").image_size == (64, 32)
    with pytest.raises(ConfigError, match="image size is unknown"):
        choose(_info({"default": signature}), None, "m")


@pytest.mark.parametrize(
    ("images", "vectors", "fault"),
    [
        (_float(None, 4, 4, 1), _float(None, 5), "not images"),
        (_float(None, 4, 3), _float(None, 5), "not images"),
        (TensorInfo(dtype="uint8", shape=(None, 4, 4, 3)), _float(None, 5), "uint8"),
        (_float(1, 4, 4, 3), _float(1, 5), "only batches of 1"),
        (_float(None, 4, 4, 3), _float(None, 2, 2, 5), "not vectors"),
        (_float(None, 4, 4, 3), TensorInfo(dtype="float32", shape=None), "unknown shape"),
        (_float(None, 4, 4, 3), _float(None, None), "width"),
    ],
)
def test_a_signature_that_gives_no_vectors_is_refused(
    images: TensorInfo, vectors: TensorInfo, fault: str
) -> None:
    info = _info({"default": ({"images": images}, {"default": vectors})}, None)
    with pytest.raises(ConfigError, match=fault):
        choose(info, None, "m")


def test_a_missing_signature_tells_the_signatures() -> None:
    info = _info({"default": (IMAGES, {"default": _float(None, 5)})})
    with pytest.raises(ConfigError, match=r"'image_classification'; it has: default"):
        choose(info, "image_classification", "m")


def test_nothing_light_imports_tensorflow_or_beam() -> None:
    code = (
        "import sys, hubbeam.modules.store, hubbeam.modules.inspect, hubbeam.pipelines.modules_cli;"
        "bad = {'tensorflow', 'tensorflow_hub', 'apache_beam'} & {*sys.modules}; assert not bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
