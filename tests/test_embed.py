"""The transform for other people's pipelines, and what happens to a batch that fails."""

from pathlib import Path

import apache_beam as beam
import numpy as np
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that

from hubbeam import EmbedImages, Module
from hubbeam.modules.store import Store

MODULE = "mobilenet_v2_050_224"


def test_embed_images_in_a_pipeline(store: Store, photos: Path, tmp_path: Path) -> None:
    coffee, rocket = str(photos / "coffee.jpg"), str(photos / "rocket.jpg")
    broken = (photos / "chelsea.jpg").read_bytes()[:3000]
    expected = Module.load(MODULE, store=store).embed([coffee, rocket, rocket])

    def check_vectors(found: list[tuple[str, np.ndarray]]) -> None:
        assert {uri for uri, _ in found} == {coffee, rocket, "in memory"}
        vectors = dict(found)
        order = [coffee, rocket, "in memory"]
        for uri, wanted in zip(order, expected, strict=True):
            assert vectors[uri].dtype == np.float32
            assert np.abs(vectors[uri] - wanted).max() < 1e-5

    def check_rejects(found: list[dict[str, str]]) -> None:
        reasons = {row["uri"]: (row["stage"], row["reason"]) for row in found}
        assert reasons == {"gone.jpg": ("read", "not_found"), "cut": ("decode", "truncated")}

    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        images = pipeline | beam.Create(
            [coffee, rocket, "gone.jpg", ("in memory", Path(rocket).read_bytes()), ("cut", broken)]
        )
        vectors, rejects = images | EmbedImages(MODULE, store=store.root, batch_size=2)
        assert_that(vectors, check_vectors, "vectors")
        assert_that(rejects, check_rejects, "rejects")
