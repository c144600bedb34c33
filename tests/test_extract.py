"""The main job, end to end: real module, real files, a real runner."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.metrics import MetricsFilter
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from hubbeam.modules.engines.tensorflow import import_tensorflow
from hubbeam.modules.errors import REASONS, ConfigError
from hubbeam.modules.store import Store
from hubbeam.pipelines import extract
from hubbeam.pipelines.options import ExtractOptions
from hubbeam.transforms.publish import RunReport

MODULE = "mobilenet_v2_050_224"


def run(store: Store, output: Path | str, *inputs: Path | str, **options: Any) -> RunReport:
    settings = ExtractOptions(
        inputs=tuple(str(name) for name in inputs),
        modules=options.pop("modules", (MODULE,)),
        output=str(output),
        store=store.root,
        **options,
    )
    return extract.run_extract(settings, [])


def read(output: Path | str, module: str = MODULE) -> pa.Table:
    return pq.read_table(f"{output}/{module}")


def vectors_of(table: pa.Table) -> np.ndarray:
    return np.stack(table["vector"].combine_chunks().to_numpy(zero_copy_only=False))


def names_of(table: pa.Table) -> list[str]:
    return [Path(uri).name for uri in table["uri"].to_pylist()]


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.fixture(scope="module")
def labelled_run(store: Store, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("labelled") / "out"
    run(store, output, shared / "images" / "labelled", preset="hub", shards=3)
    return output


def test_vectors_are_those_of_tensorflow(labelled_run: Path, original: Path) -> None:
    """Decode, tf.image.resize, the module's signature: the plain way gives the same vectors."""
    tf = import_tensorflow()
    import tensorflow_hub as hub

    table = read(labelled_run)
    assert table.num_rows == 200
    signature = hub.load(str(original)).signatures["image_feature_vector"]

    def plain(uri: str) -> np.ndarray:
        # INTEGER_ACCURATE is what Pillow, and we, decode with: "the same decoded pixels".
        image = tf.io.decode_jpeg(tf.io.read_file(uri), channels=3, dct_method="INTEGER_ACCURATE")
        image = tf.image.convert_image_dtype(image, tf.float32)
        image = tf.image.resize(image, [224, 224])
        return signature(image[tf.newaxis])["default"].numpy()[0]

    expected = np.stack([plain(uri) for uri in table["uri"].to_pylist()])
    assert cosines(vectors_of(table), expected).min() > 0.99999


def test_neighbours_are_of_the_same_class(labelled_run: Path) -> None:
    table = read(labelled_run)
    vectors = vectors_of(table)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -1)
    classes = np.array([name.split("_")[0] for name in names_of(table)])
    assert (classes[similar.argmax(axis=1)] == classes).sum() >= 120


def test_readers_of_parquet_agree(labelled_run: Path) -> None:
    import duckdb
    import pandas as pd
    import polars as pl

    files = f"{labelled_run}/{MODULE}/*.parquet"
    table = read(labelled_run)
    expected = vectors_of(table)
    frame = pd.read_parquet(labelled_run / MODULE)
    assert np.array_equal(np.stack(frame["vector"].to_list()), expected)
    polars = pl.read_parquet(files)
    assert np.array_equal(polars["vector"].to_numpy(), expected)
    rows = duckdb.sql(f"SELECT uri, vector FROM '{files}' ORDER BY uri").fetchall()
    assert [row[0] for row in rows] == table["uri"].to_pylist()
    assert np.array_equal(np.array([row[1] for row in rows], np.float32), expected)


def test_columns_and_layout(labelled_run: Path, shared: Path) -> None:
    import hashlib

    table = read(labelled_run)
    assert table["uri"].to_pylist() == sorted(table["uri"].to_pylist())
    row = table.slice(7, 1).to_pylist()[0]
    data = Path(row["uri"]).read_bytes()
    assert row["sha256"] == hashlib.sha256(data).hexdigest()
    assert row["size_bytes"] == len(data)
    assert row["modified"].timestamp() == pytest.approx(Path(row["uri"]).stat().st_mtime, abs=1e-5)
    assert row["format"] == "JPEG"
    assert table.schema.field("vector").type == pa.list_(
        pa.field("element", pa.float32(), nullable=False), 1280
    )
    with pq.ParquetFile(labelled_run / MODULE / "vectors-00001-of-00003.parquet") as file:
        columns = {
            column.path_in_schema: column
            for column in map(file.metadata.row_group(0).column, range(file.metadata.num_columns))
        }
        stamp = json.loads(file.metadata.metadata[b"hubbeam"])
    assert columns["uri"].statistics.min.endswith(".jpg")
    assert "PLAIN" in columns["vector.list.element"].encodings
    assert not any("DICT" in name for name in columns["vector.list.element"].encodings)
    assert stamp["shard"] == 1 and stamp["shards"] == 3
    assert stamp["module"]["name"] == MODULE and len(stamp["module"]["sha256"]) == 64
    assert stamp["module"]["signature"] == "image_feature_vector"
    assert stamp["preset"]["name"] == "hub" and stamp["engine"]["name"]


def test_report_is_published_last_and_counts(labelled_run: Path) -> None:
    report = RunReport.model_validate_json((labelled_run / "run.json").read_bytes())
    assert report.published and report.listed == 200 and report.shards == 3
    module = report.modules[MODULE]
    assert module["vectors"] == 200 and module["rejects"] == 0
    assert [shard["rows"] for shard in module["shards"]] == [66, 67, 67]
    import hashlib

    for shard in module["shards"]:
        data = (labelled_run / shard["path"]).read_bytes()
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
    assert sorted(str(p.relative_to(labelled_run)) for p in labelled_run.rglob("*")) == [
        MODULE,
        f"{MODULE}/_SUCCESS",
        *(f"{MODULE}/vectors-{n:05d}-of-00003.parquet" for n in range(3)),
        "run.json",
    ]


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_tfrecord(
    store: Store, shared: Path, labelled_run: Path, tmp_path: Path, compression: str
) -> None:
    tf = import_tensorflow()
    report = run(
        store,
        tmp_path / "out",
        shared / "images" / "labelled" / "n0[12]*.jpg",
        preset="hub",
        format="tfrecord",
        compression=compression,
        shards=2,
    )
    schema = json.loads((tmp_path / "out" / MODULE / "schema.json").read_bytes())
    spec = {name: tf.io.FixedLenFeature(**kind) for name, kind in schema["features"].items()}
    files = sorted(str(file) for file in (tmp_path / "out" / MODULE).glob("vectors-*"))
    kind = "GZIP" if compression == "gzip" else ""
    records = tf.data.TFRecordDataset(files, kind).batch(16)
    rows = [tf.io.parse_example(batch, spec) for batch in records]
    uris = [uri.decode() for batch in rows for uri in batch["uri"].numpy()]
    vectors = np.concatenate([batch["vector"].numpy() for batch in rows])
    assert len(uris) == report.modules[MODULE]["vectors"] > 50
    parquet = read(labelled_run)
    order = {uri: row for row, uri in enumerate(parquet["uri"].to_pylist())}
    expected = vectors_of(parquet)[[order[uri] for uri in uris]]
    assert np.allclose(vectors, expected, atol=1e-5)
    stamps = [json.loads(text) for batch in rows for text in batch["hubbeam"].numpy() if text]
    assert [stamp["shard"] for stamp in stamps] == [0, 1]
    assert stamps[0]["module"]["sha256"] == schema["hubbeam"]["module"]["sha256"]


def test_every_nasty_file_is_accounted_for(
    store: Store, shared: Path, peak_code: str, tmp_path: Path
) -> None:
    """Broken files, bombs and rotations among good images; the memory of a process of its own."""
    images = shared / "images"
    nasty = [file for file in (images / "nasty").iterdir() if not file.name.startswith("LICENSE")]
    good = sorted((images / "labelled").glob("*.jpg"))[:60]
    output = tmp_path / "out"
    code = (
        "import sys; from hubbeam.pipelines import cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: code = end.code or 0\n"
        f"{peak_code}sys.exit(code)"
    )
    arguments = ["extract", *nasty, *good, images / "orientation", "--store", store.root]
    arguments += ["-m", MODULE, "-o", output, "--max-reject-fraction", "0.5"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.split()[-1]) < 2.5 * 2**30

    table, rejects = read(output), pq.read_table(output / "rejects")
    vectors = dict(zip(names_of(table), vectors_of(table), strict=True))
    rejected = {Path(row["uri"]).name: row for row in rejects.to_pylist()}
    listed = {file.name for file in [*nasty, *good, *(images / "orientation").glob("*.jpg")]}
    assert vectors.keys() | rejected.keys() == listed
    assert not vectors.keys() & rejected.keys()
    assert {file.name for file in good} <= vectors.keys()
    assert {row["reason"] for row in rejected.values()} <= REASONS.keys()
    assert all(row["message"] and "\n" not in row["message"] for row in rejected.values())
    assert rejected["html_page.jpg"]["reason"] == "unsupported_format"
    assert rejected["zero_bytes.jpg"]["reason"] == "empty"
    assert rejected["zero_bytes.jpg"]["sha256"] is None
    assert len(rejected["html_page.jpg"]["sha256"]) == 64

    turned = np.stack([vectors[f"Landscape_{n}.jpg"] for n in range(1, 9)])
    turned /= np.linalg.norm(turned, axis=1, keepdims=True)
    assert (turned @ turned.T).min() > 0.9


def test_two_processes_give_the_same_vectors(
    store: Store, shared: Path, labelled_run: Path, tmp_path: Path
) -> None:
    run(store, tmp_path / "out", shared / "images" / "labelled", preset="hub", shards=3, workers=2)
    ours, theirs = read(tmp_path / "out"), read(labelled_run)
    assert ours["uri"].to_pylist() == theirs["uri"].to_pylist()
    assert np.abs(vectors_of(ours) - vectors_of(theirs)).max() < 1e-5


def test_too_many_rejects_are_not_published(store: Store, photos: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes((photos / "coffee.jpg").read_bytes()[:4000])
    output = tmp_path / "out"
    report = run(store, output, photos, broken, shards=3)
    assert not report.published and report.rejects == {"truncated": 1}
    assert not list(output.rglob("_SUCCESS")) and not (output / "run.json").exists()
    written = {p: p.stat().st_mtime_ns for p in output.glob(f"{MODULE}/*")}

    report = run(store, output, photos, broken, shards=3, max_reject_fraction=0.2)
    assert report.published and report.shards_kept == report.shards == 3
    assert written.items() <= {p: p.stat().st_mtime_ns for p in output.glob(f"{MODULE}/*")}.items()
    assert (output / MODULE / "_SUCCESS").exists() and not (output / ".hubbeam").exists()


def test_overwrite_replaces_only_with_what_is_whole(
    store: Store, photos: Path, tmp_path: Path
) -> None:
    output, broken = tmp_path / "out", tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff nothing")
    run(store, output, photos, shards=4)
    (output / "notes.txt").write_text("the user's own")
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="already holds a dataset"):
        run(store, output, photos)

    inputs = (photos / "coffee.jpg", broken)
    assert not run(store, output, *inputs, overwrite=True).published
    assert before.items() <= {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}.items()

    report = run(store, output, *inputs, overwrite=True, max_reject_fraction=0.5)
    assert report.published and report.shards_kept == 1
    assert sorted(str(p.relative_to(output)) for p in output.rglob("*") if p.is_file()) == [
        f"{MODULE}/_SUCCESS",
        f"{MODULE}/vectors-00000-of-00001.parquet",
        "notes.txt",
        "rejects/rejects-00000-of-00001.parquet",
        "run.json",
    ]
    assert names_of(read(output)) == ["coffee.jpg"]


def test_two_modules_share_a_run(store: Store, photos: Path, tmp_path: Path) -> None:
    """One fails on white pictures and gives NaN for black ones: only its own are lost."""
    from PIL import Image

    picky = write_picky_module(tmp_path / "picky")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (50, 50), "white").save(pictures / "white.png")
    Image.new("RGB", (50, 50), "black").save(pictures / "black.png")
    Image.new("RGB", (50, 50), "red").save(pictures / "red.png")
    output = tmp_path / "out"
    report = run(
        store,
        output,
        photos,
        pictures,
        modules=(MODULE, str(picky)),
        engine="tensorflow",
        max_reject_fraction=1,
    )
    total = report.listed
    assert report.modules[MODULE]["vectors"] == total and not report.modules[MODULE]["rejects"]
    assert report.modules["picky"]["vectors"] == total - 2
    assert report.modules["picky"]["rejects_by_reason"] == {"embed_failed": 1, "not_finite": 1}
    rejects = pq.read_table(output / "rejects").to_pylist()
    assert {(Path(row["uri"]).name, row["reason"], row["module"]) for row in rejects} == {
        ("white.png", "embed_failed", "picky"),
        ("black.png", "not_finite", "picky"),
    }
    assert {row["stage"] for row in rejects} == {"embed"}
    table = read(output, "picky")
    red = vectors_of(table)[names_of(table).index("red.png")]
    assert red == pytest.approx([0.5, 1], abs=1e-6)


def write_picky_module(folder: Path) -> Path:
    tf = import_tensorflow()

    class Picky(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, 32, 32, 3], tf.float32, "images")])
        def features(self, images: Any) -> Any:
            mean = tf.reduce_mean(images, [1, 2, 3])
            outside = tf.cast(mean > 0.999, tf.int32) * 9
            half = tf.gather(tf.constant([0.5]), outside)
            checked = tf.debugging.check_numerics(mean / mean, "too black")
            return {"default": tf.stack([half, checked], axis=1)}

    module = Picky()
    tf.saved_model.save(module, str(folder), {"image_feature_vector": module.features})
    return folder


def test_odd_names_and_duplicates(store: Store, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd names"
    folder.mkdir()
    odd = ["a b.jpg", "c#d.jpg", "[e].jpg", "f\ng.jpg", "héé 図.jpg", "h?i*.jpg", "%41.jpg"]
    for name in odd:
        (folder / name).write_bytes((photos / "coffee.jpg").read_bytes())
    (folder / b"\xff\xfe.jpg".decode("utf-8", "surrogateescape")).write_bytes(b"x")
    report = run(
        store, tmp_path / "out", folder, folder / "a b.jpg", folder / "*#*", max_reject_fraction=0.2
    )
    assert report.duplicates == 2 and report.rejects == {"bad_name": 1}
    assert sorted(names_of(read(tmp_path / "out"))) == sorted(odd)
    [reject] = pq.read_table(tmp_path / "out" / "rejects").to_pylist()
    assert reject["stage"] == "list"


def test_a_table_names_the_images(store: Store, photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "uris.parquet"
    names = [str(photos / "coffee.jpg"), str(photos / "rocket.jpg"), str(tmp_path / "gone.jpg")]
    pq.write_table(pa.table({"where": names}), table)
    report = run(
        store,
        tmp_path / "out",
        table=str(table),
        uri_column="where",
        max_reject_fraction=0.5,
    )
    assert report.listed == 3 and report.rejects == {"not_found": 1}


def test_counts_are_beam_metrics(store: Store, photos: Path, tmp_path: Path) -> None:
    settings = ExtractOptions(
        inputs=(str(photos),), modules=(MODULE,), output=str(tmp_path), store=store.root
    )
    from hubbeam.pipelines.runners import Runner
    from hubbeam.transforms.job import ExtractJob

    runner = Runner.from_options(settings, [])
    meaning = extract.resolve(settings, runner)
    planned = extract._plan_in(str(tmp_path), meaning, settings, False, runner)
    engines = extract._choose_engines(meaning, settings, runner)
    job = ExtractJob(output=str(tmp_path), planned=planned, engines=engines, store=store.root)
    pipeline = beam.Pipeline(runner=FnApiRunner())
    extract.build_pipeline(pipeline, job)
    result = pipeline.run()
    result.wait_until_finish()
    found = result.metrics().query(MetricsFilter().with_namespace("hubbeam"))
    counters = {metric.key.metric.name: metric.committed for metric in found["counters"]}
    count = len(list(photos.glob("*.jpg")))
    assert counters[f"vectors_{MODULE}"] == count and counters["shards_written"] == 1
    assert counters["bytes_read"] == sum(p.stat().st_size for p in photos.glob("*.jpg"))
    timed = Counter(metric.key.metric.name for metric in found["distributions"])
    assert {"read_batch_msecs", "decode_batch_msecs", "embed_batch_msecs"} <= timed.keys()


def test_from_and_to_object_storage(
    store: Store, photos: Path, tmp_path: Path, gcs_bucket: str
) -> None:
    from hubbeam.transforms import files

    for photo in photos.glob("*.jpg"):
        files.write_bytes(f"{gcs_bucket}/photos/deep/{photo.name}", photo.read_bytes())
    files.write_bytes(f"{gcs_bucket}/photos/broken #1.jpg", b"\xff\xd8\xff nothing")
    output = f"{gcs_bucket}/vectors"
    report = run(store, output, f"{gcs_bucket}/photos", shards=2, max_reject_fraction=0.2)
    assert report.published and report.rejects == {"corrupt": 1}
    names = files.list_below(output)
    assert names == [
        f"{MODULE}/_SUCCESS",
        f"{MODULE}/vectors-00000-of-00002.parquet",
        f"{MODULE}/vectors-00001-of-00002.parquet",
        "rejects/rejects-00000-of-00002.parquet",
        "run.json",
    ]
    run(store, tmp_path / "local", photos)
    tables = [
        pq.read_table(pa.BufferReader(files.read_bytes(f"{output}/{name}")))
        for name in names
        if name.startswith(MODULE) and name.endswith("parquet")
    ]
    remote, local = pa.concat_tables(tables), read(tmp_path / "local")
    assert names_of(remote) == names_of(local)
    assert np.abs(vectors_of(remote) - vectors_of(local)).max() < 1e-5
    with pytest.raises(ConfigError, match="already holds a dataset"):
        run(store, output, f"{gcs_bucket}/photos")
    with pytest.raises(ConfigError, match="no image matches"):
        run(store, output, f"{gcs_bucket}/photos/**/no*.jpg", overwrite=True)
    assert files.list_below(output) == names
    assert run(store, output, f"{gcs_bucket}/photos/**/c*.jpg", overwrite=True).published
    assert files.list_below(output) == [
        f"{MODULE}/_SUCCESS",
        f"{MODULE}/vectors-00000-of-00001.parquet",
        "run.json",
    ]
