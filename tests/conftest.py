"""Fixtures of all tests: the material in ../shared, a store with the original module, photos."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from hubbeam.modules.store import Store

# Before anything imports TensorFlow: its start-up messages drown what a test prints.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

ROOT = Path(__file__).resolve().parents[1]
ORIGINAL = "modules/mobilenet_v2_050_224_feature_vector_1"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ``shared`` beside the checkout: real modules, checkpoints and odd images."""
    folder = ROOT.parent / "shared"
    if not (folder / ORIGINAL).is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{folder} is not there, and CI needs it")
        pytest.skip(f"{folder} is not there")
    return folder


@pytest.fixture(scope="session")
def original(shared: Path) -> Path:
    """The original TF-Hub module mobilenet_v2_050_224, as Google published it."""
    return shared / ORIGINAL


@pytest.fixture(scope="session")
def store(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store that holds the original module as mobilenet_v2_050_224."""
    made = Store(tmp_path_factory.mktemp("store"))
    made.add(original, "mobilenet_v2_050_224")
    return made


@pytest.fixture(scope="session")
def photos() -> Path:
    """The photographs that are part of the project."""
    return Path(__file__).parent / "photos"


@pytest.fixture(scope="session")
def labelled(shared: Path) -> list[Path]:
    """200 photographs of 40 ImageNet classes, sorted by name."""
    return sorted((shared / "images" / "labelled").glob("*.jpg"))


@pytest.fixture(scope="session")
def peak_code() -> str:
    """Code that prints the peak memory of its process, in bytes, as the last line of stderr.

    It is the benchmark's: `ru_maxrss` begins with the peak of the process that started this one.
    """
    benchmarks = str(ROOT / "benchmarks")
    return (
        f"import sys; sys.path.append({benchmarks!r}); from child import peak_bytes\n"
        "print(peak_bytes(), file=sys.stderr)\n"
    )


@pytest.fixture(scope="session")
def gcs_emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """A storage emulator on loopback, which all clients of this process and its children use."""
    spec = importlib.util.spec_from_file_location("gcs", Path(__file__).with_name("gcs.py"))
    assert spec is not None and spec.loader is not None
    gcs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gcs)
    with (
        gcs.running(tmp_path_factory.mktemp("gcs")) as environment,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in environment.items():
            patch.setenv(name, value)
        yield gcs


@pytest.fixture
def gcs_bucket(gcs_emulator: ModuleType) -> str:
    """A new, empty bucket, ``gs://name``, in the emulator."""
    return str(gcs_emulator.make_bucket())
