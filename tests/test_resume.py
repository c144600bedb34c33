"""A run that is cut off is taken up where it stopped, and gives what an undisturbed one gives."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from hubbeam.modules.errors import ConfigError
from hubbeam.modules.store import Store
from hubbeam.pipelines import extract
from hubbeam.pipelines.options import ExtractOptions
from hubbeam.transforms import files
from hubbeam.transforms.publish import RunReport

MODULE = "mobilenet_v2_050_224"


def options(store: Store, images: Path, output: Path, **changes: object) -> ExtractOptions:
    return ExtractOptions.model_validate(
        {
            "inputs": (str(images),),
            "modules": (MODULE,),
            "output": str(output),
            "store": store.root,
            "shards": 10,
            **changes,
        }
    )


def run(store: Store, images: Path, output: Path, **changes: object) -> RunReport:
    return extract.run_extract(options(store, images, output, **changes), [])


def contents(output: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in output.rglob("*")
        if path.is_file() and path.name != "run.json"
    }


def begin(store: Store, images: Path, output: Path, *flags: str) -> subprocess.Popen[str]:
    """Begins a run of ten shards in a process of its own, and returns when two are written."""
    arguments = ["extract", images, "-m", MODULE, "-o", output, "--store", store.root, *flags]
    command = [sys.executable, "-m", "hubbeam.pipelines", *arguments, "--shards", "10"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(output.glob(f"{MODULE}/vectors-*"))) < 2:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


@pytest.fixture(scope="module")
def inputs(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The labelled photographs and a broken one."""
    folder = tmp_path_factory.mktemp("inputs")
    for photo in (shared / "images" / "labelled").glob("*.jpg"):
        (folder / photo.name).symlink_to(photo)
    (folder / "a broken one.jpg").write_bytes(b"\xff\xd8\xff nothing")
    return folder


@pytest.fixture(scope="module")
def undisturbed(store: Store, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run(store, inputs, output).published
    return output


@pytest.fixture(scope="module")
def killed(store: Store, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that was killed with SIGKILL after its first shards."""
    output = tmp_path_factory.mktemp("killed") / "out"
    process = begin(store, inputs, output)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return output


def test_killed_run_is_taken_up(
    store: Store, inputs: Path, killed: Path, undisturbed: Path, tmp_path: Path
) -> None:
    assert not list(killed.rglob("_SUCCESS")) and not (killed / "run.json").exists()
    finished = {p: p.stat().st_mtime_ns for p in killed.glob(f"{MODULE}/vectors-*")}
    assert 2 <= len(finished) < 10

    for other in (
        {"preset": "hub"},
        {"format": "tfrecord"},
        {"inputs": (str(inputs / "n0*"),)},
        {"signature": "default"},
    ):
        key = "modules" if "signature" in other else next(iter(other))
        with pytest.raises(ConfigError, match=rf"unfinished run that differs \(.*{key}: "):
            extract.run_extract(options(store, inputs, killed, **other), [])
    with pytest.raises(ConfigError, match=r'\(preset: "photo" there, "hub" here\)'):
        run(store, inputs, killed, preset="hub")
    # What a killed writer leaves.
    (killed / MODULE / ".vectors-00009-of-00010.parquet.1-abcd.tmp").write_bytes(b"half")
    (killed / ".run.json.1-abcd.tmp").write_bytes(b"half")
    (killed / ".mine.tmp").write_bytes(b"the user's own")

    report = run(store, inputs, killed)
    assert report.published and report.shards_kept == len(finished)
    assert report.images_kept == sum(
        pq.read_metadata(path).num_rows + (path.name.startswith("vectors-00000"))
        for path in finished
    )
    assert finished.items() <= {p: p.stat().st_mtime_ns for p in killed.rglob("*")}.items()
    (killed / ".mine.tmp").unlink()
    assert contents(killed) == contents(undisturbed)


def test_death_of_a_worker_process_ends_the_run(store: Store, inputs: Path, tmp_path: Path) -> None:
    many = tmp_path / "many"
    many.mkdir()
    for photo in inputs.glob("n*.jpg"):
        for number in range(10):
            (many / f"{number}-{photo.name}").symlink_to(photo)
    output = tmp_path / "out"
    process = begin(store, many, output, "--workers", "2")
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.cmdline()[1:] == ["-m", "apache_beam.runners.worker.sdk_worker_main"]
    ]
    assert len(workers) == 2
    workers[0].kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("hubbeam: a worker process died (exit code "), errors
    assert "Traceback" not in errors
    assert not psutil.wait_procs(workers, timeout=10)[1]  # none is left
    assert not list(output.rglob("_SUCCESS"))
    report = run(store, many, output)
    assert report.published and 2 <= report.shards_kept < 10


def test_damaged_shards_are_computed_again(
    store: Store, inputs: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    report = run(store, inputs, output, max_reject_fraction=0)
    assert not report.published  # for the broken picture, so that all shards are there
    shards = sorted(output.glob(f"{MODULE}/vectors-*"))
    shards[1].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:-100])
    damaged = bytearray(shards[3].read_bytes())
    damaged[len(damaged) // 2] ^= 1  # a single bit of a vector
    shards[3].write_bytes(damaged)
    shards[4].write_bytes(shards[5].read_bytes())
    (output / "rejects" / "rejects-00000-of-00010.parquet").unlink()
    report = run(store, inputs, output)
    assert report.published and report.shards_kept == 5
    assert contents(output) == contents(undisturbed)


def test_two_runs_in_one_output_are_refused(store: Store, inputs: Path, tmp_path: Path) -> None:
    with (
        extract._only_one(str(tmp_path / "out")),
        pytest.raises(ConfigError, match="another run is working"),
    ):
        run(store, inputs, tmp_path / "out")


@pytest.mark.parametrize("bad", range(3))
def test_shard_that_cannot_be_ended_fails_the_run(
    store: Store, photos: Path, tmp_path: Path, bad: int
) -> None:
    """Also where the next shard is under way by then, or none is left."""
    in_the_way = tmp_path / "out" / MODULE / f"vectors-{bad:05d}-of-00003.parquet"
    in_the_way.mkdir(parents=True)
    with pytest.raises(Exception, match=r"Is a directory.*vectors-"):
        run(store, photos, tmp_path / "out", shards=3)
    assert not list((tmp_path / "out").rglob("_SUCCESS"))
    in_the_way.rmdir()
    assert run(store, photos, tmp_path / "out", shards=3).published


def test_publication_that_was_cut_off_is_finished(
    store: Store, inputs: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Overwriting dies after some files were moved: nothing is computed again, nothing is lost."""
    output = tmp_path / "out"
    run(store, inputs / "n01443537*.jpg", output, shards=2)
    report = run(store, inputs, output, overwrite=True, max_reject_fraction=0)
    assert not report.published
    (output / ".hubbeam" / "moving").touch()
    new = output / ".hubbeam" / "new" / MODULE
    for shard in (0, 1, 2):
        name = f"vectors-{shard:05d}-of-00010.parquet"
        (new / name).replace(output / MODULE / name)
    (output / MODULE / "_SUCCESS").unlink()
    report = run(store, inputs, output, overwrite=True)
    assert report.published and report.shards_kept == 10
    assert contents(output) == contents(undisturbed)


def test_overwriting_keeps_nothing_of_the_old_run(
    store: Store, photos: Path, tmp_path: Path
) -> None:
    """Even where the plan is the same."""
    images, output = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    (images / "a.jpg").write_bytes((photos / "coffee.jpg").read_bytes())
    (images / "b.jpg").write_bytes(b"nothing")
    assert run(store, images, output, shards=1, max_reject_fraction=0.5).published
    again = {"shards": 1, "overwrite": True}
    report = run(store, images, output, max_reject_fraction=0, **again)
    assert not report.published and report.shards_kept == 0
    assert (output / MODULE / "_SUCCESS").exists()
    report = run(store, images, output, max_reject_fraction=0.5, **again)
    assert report.published and report.shards_kept == 1


def test_work_folder_half_deleted_is_no_run(
    store: Store, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dies while the work folder is deleted, after the publication or for another plan."""
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(files, "delete_folder", lambda folder: None)
        assert run(store, photos, output, shards=2).published
    assert list((output / ".hubbeam").rglob("plan-*"))
    with pytest.raises(ConfigError, match="already holds a dataset"):
        run(store, photos, output, shards=2)
    assert run(store, photos, output, shards=1, overwrite=True).shards_kept == 0
    assert not (output / ".hubbeam").exists()


def test_relative_inputs_mean_the_folder_they_were_given_in(
    store: Store, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    for folder in ("one", "other"):
        (tmp_path / folder / "images").mkdir(parents=True)
        (tmp_path / folder / "images" / "a.jpg").write_bytes(b"nothing")
    monkeypatch.chdir(tmp_path / "one")
    assert not run(store, Path("images"), output, shards=1).published
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(ConfigError, match="unfinished run that differs"):
        run(store, Path("images"), output, shards=1)


@pytest.mark.parametrize("place", ["file/below", "http://host/folder"])
def test_outputs_that_cannot_be(
    place: str, store: Store, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(ConfigError, match=r"--output .* cannot be used"):
        extract.run_extract(
            options(store, photos, Path("x")).model_copy(update={"output": place}), []
        )
