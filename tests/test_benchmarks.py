"""The benchmark's own parts: its photographs, and that both jobs compute the same vectors."""

import io
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hubbeam.modules.store import Store

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
MODULE = "mobilenet_v2_050_224"


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import photos

    return photos


def test_photographs_are_what_their_kind_says(maker: ModuleType) -> None:
    kind = maker.Kind(200, 150, progressive=True, orientation=6)
    data = maker.encode(kind, [1, 2])
    assert data == maker.encode(kind, [1, 2])
    assert data != maker.encode(kind, [1, 3])
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.size, image.mode) == ("JPEG", (200, 150), "RGB")
    assert image.info["progressive"] and image.getexif()[0x0112] == 6
    # A photograph has structure and noise: a flat or a random picture would be far off.
    assert 2_000 < len(data) < 40_000


def test_folder_holds_as_many_names_as_wanted(maker: ModuleType, tmp_path: Path) -> None:
    made = maker.make_photos("256x192", 3, tmp_path)
    folder = maker.lay_out(made, 7, tmp_path / "input")
    assert folder == maker.lay_out(made, 7, tmp_path / "input")
    contents = [path.read_bytes() for path in sorted(folder.iterdir())]
    assert len(contents) == 7 and len(set(contents)) == 3


def test_plain_job_and_ours_give_the_same_vectors(
    maker: ModuleType, store: Store, original: Path, tmp_path: Path
) -> None:
    folder = maker.lay_out(maker.make_photos("500x375", 12, tmp_path), 12, tmp_path / "input")
    outputs = {}
    for task in ("plain", "ours"):
        outputs[task] = tmp_path / task
        stamps = run(
            {
                "task": task,
                "folder": str(folder),
                "output": str(outputs[task]),
                "module_folder": str(original),
                "size": 224,
                "modules": [MODULE],
                "store": store.root,
            },
            tmp_path / f"{task}.json",
        )
        assert stamps["pipeline_begin"] < stamps["first_vector"] < stamps["pipeline_end"]
        assert stamps["peak_bytes"] > 50_000_000
    plain, ours = vectors(outputs["plain"]), vectors(outputs["ours"] / MODULE)
    assert plain.keys() == ours.keys() and len(plain) == 12
    for uri, vector in plain.items():
        other = ours[uri]
        cosine = vector @ other / np.linalg.norm(vector) / np.linalg.norm(other)
        assert cosine > 0.9999, uri


def run(task: dict[str, Any], result: Path) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / "child.py"), json.dumps(task), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def vectors(folder: Path) -> dict[str, np.ndarray]:
    tables = [pq.read_table(file) for file in folder.glob("*.parquet")]
    return {
        row["uri"]: np.array(row["vector"], np.float32)
        for table in tables
        for row in table.select(["uri", "vector"]).to_pylist()
    }
