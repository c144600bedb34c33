"""The command line: exit codes, job files, what the user sees."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hubbeam.modules.errors import ConfigError
from hubbeam.modules.store import Store
from hubbeam.pipelines.options import load_options
from hubbeam.pipelines.runners import Runner

MODULE = "mobilenet_v2_050_224"


def hubbeam(*arguments: object, store: Store | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hubbeam.pipelines", *map(str, arguments)]
    if store is not None:
        command += ["--store", store.root]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_a_whole_job_says_five_lines(store: Store, photos: Path, tmp_path: Path) -> None:
    done = hubbeam("extract", photos, "-m", MODULE, "-o", tmp_path / "out", store=store)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        "images",
        "speed",
        "rejects",
        "vectors",
        "output",
    ]
    assert str(tmp_path / "out") in lines[-1]
    noise = [line for line in done.stderr.splitlines() if not line.startswith("hubbeam: ")]
    assert not noise
    assert json.loads((tmp_path / "out" / "run.json").read_text())["listed"] == 8

    again = hubbeam("extract", photos, "-m", MODULE, "-o", tmp_path / "out", store=store)
    assert again.returncode == 2 and again.stderr.count("\n") == 1
    assert "already holds a dataset" in again.stderr


def test_quiet_and_rejects(store: Store, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"<html>")
    arguments = ["extract", photos, tmp_path / "broken.jpg", "-m", MODULE, "-q"]
    arguments += ["-o", tmp_path / "out", "--engine", "openvino"]
    done = hubbeam(*arguments, store=store)
    assert done.returncode == 3 and not done.stdout
    assert "1 of 9 images were rejected" in done.stderr
    fraction = done.stderr.split("--max-reject-fraction ")[2].split()[0]
    done = hubbeam(*arguments, "--max-reject-fraction", fraction, store=store)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_dry_run_leaves_nothing(store: Store, photos: Path, tmp_path: Path) -> None:
    done = hubbeam(
        "extract", photos, "-m", MODULE, "-o", tmp_path / "out", "--dry-run", store=store
    )
    assert done.returncode == 0, done.stderr
    size = sum(photo.stat().st_size for photo in photos.glob("*.jpg"))
    assert "images    8" in done.stdout and f"{size / 1000:.1f} kB" in done.stdout
    assert "1 of about 8 images" in done.stdout and "engine" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["extract"], "no images"),
        (["extract", "x.jpg"], "no module"),
        (["extract", "x.jpg", "-m", MODULE], "no output"),
        (["extract", "x.jpg", "-m", MODULE, "-o", "o", "--batch-size", "0"], "batch_size"),
        (["extract", "x.jpg", "--table", "t.csv", "-m", MODULE, "-o", "o"], "exclude each other"),
        (["extract", "x.jpg", "-m", MODULE, "-o", "o", "--preset", "best"], "no preset 'best'"),
        (["extract", "x.jpg", "-m", MODULE, "-o", "o", "--engine", "warp"], "no engine 'warp'"),
        (["extract", "nowhere/*.jpg", "-m", MODULE, "-o", "o"], "nowhere/*.jpg"),
        (["extract", "x.jpg", "--max-pixels", "0", "-m", MODULE, "-o", "o"], "max_pixels"),
        (["extract", "x.jpg", "--max-bytes", "much", "-m", MODULE, "-o", "o"], "max_bytes"),
        (["extract", "x.jpg", "-m", MODULE, "-o", "o", "--runner", "Spork"], "no runner 'Spork'"),
        (["extract", "x.jpg", "-m", MODULE, "-o", "/dev/null/o"], "/dev/null/o"),
        (["extract", "--table", "/bin/true", "-m", MODULE, "-o", "o"], "is no table"),
        (["extract", "--frobnicate"], "No such option"),
    ],
)
def test_bad_usage_is_exit_code_2(
    arguments: list[str],
    complaint: str,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = hubbeam(*arguments, store=store)
    assert done.returncode == 2 and complaint in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_job_file_alone_is_enough(store: Store, photos: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"inputs: ['{photos}']\nmodules: [{MODULE}]\noutput: unused\n")
    arguments = ["extract", "--config", job, "-o", tmp_path / "out", "--dry-run"]
    done = hubbeam(*arguments, store=store)
    assert done.returncode == 0 and "images    8" in done.stdout, done.stderr


def test_worker_processes_are_quiet_and_undisturbed(
    store: Store, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.version_info < (3, 11):
        pytest.skip("PYTHONSAFEPATH needs Python 3.11")
    (tmp_path / "random.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    # -P as the installed command has it: the launcher itself does not look there for modules.
    command = [sys.executable, "-P", "-m", "hubbeam.pipelines", "extract", photos, "-m", MODULE]
    command += ["-o", "out", "--workers", "2", "--shards", "2", "-q", "--store", store.root]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_names_that_are_not_utf8_on_the_command_line(
    store: Store, photos: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "z\udcff.jpg"
    bad.write_bytes(b"x")
    arguments = ["extract", bad, photos, "-m", MODULE, "-o", tmp_path / "out"]
    done = hubbeam(*arguments, "--max-reject-fraction", "0.5", store=store)
    assert done.returncode == 0 and "1 bad_name" in done.stdout, done.stderr
    done = hubbeam("extract", photos, "-m", MODULE, "-o", tmp_path / "o\udcff", store=store)
    assert done.returncode == 2 and "not a valid UTF-8 name" in done.stderr


def test_flags_override_the_job_file(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        "inputs: [photos]\nmodules: inception_v2\noutput: here\nshards: 3\nmax_bytes: 2MiB\n"
        "beam: [--flag=1]\n"
    )
    options = load_options(str(job), {"output": "there", "images_per_shard": 50, "modules": None})
    assert options.output == "there" and options.modules == ("inception_v2",)
    assert options.shards is None and options.images_per_shard == 50
    assert options.max_bytes == 2 << 20
    assert load_options(str(job), {"table": "t.csv"}).inputs == ()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("outptu: x", "outptu: no such setting"),
        ("inputs: [a]\nmodules: [m]\noutput: x\nbatch_size: many", "batch_size"),
        ("inputs: [a]\nmodules: [m]\noutput: x\nformat: csv", "format"),
        ("- a list", "must hold settings"),
        ("a: [", "not valid YAML"),
    ],
)
def test_job_files_are_checked(text: str, complaint: str, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(text)
    with pytest.raises(ConfigError, match=complaint) as error:
        load_options(str(job), {})
    assert str(job) in str(error.value) and "\n" not in str(error.value).split("YAML")[0]


def test_the_shipped_job_file_is_valid() -> None:
    root = Path(__file__).parents[1]
    for job in (root / "configs" / "jobs").glob("*.yaml"):
        assert load_options(str(job), {}).modules


def test_runners() -> None:
    base = {"inputs": "x", "modules": "m", "output": "gs://b/o"}
    assert Runner.from_options(load_options(None, base), []).is_local
    direct = Runner.from_options(load_options(None, {**base, "runner": "DirectRunner"}), [])
    assert direct.is_local and direct.processes == 1
    one = Runner.from_options(load_options(None, {**base, "workers": 1}), [])
    assert one == Runner.from_options(load_options(None, base), [])
    two = Runner.from_options(load_options(None, {**base, "workers": 2}), [])
    assert two.processes == two.workers == 2
    flow = Runner.from_options(
        load_options(None, {**base, "project": "p", "workers": 30}),
        ["--runner=DataflowRunner", "--experiments=no_use_multiple_sdk_containers"],
    )
    assert not flow.is_local and flow.processes == 1 and flow.workers == 30
    assert "--project=p" in flow.args and "--max_num_workers=30" in flow.args
    assert (
        Runner.from_options(load_options(None, {**base, "runner": "FlinkRunner"}), []).processes
        == 0
    )
    with pytest.raises(ConfigError, match="twice"):
        Runner.from_options(load_options(None, {**base, "runner": "x"}), ["--runner=y"])


def test_remote_workers_need_remote_folders(store: Store, photos: Path, tmp_path: Path) -> None:
    done = hubbeam(
        *("extract", photos, "-m", MODULE, "-o", "gs://nowhere/out"),
        *("--store", store.root, "--", "--runner=DataflowRunner", "--project=p"),
    )
    assert done.returncode == 2 and "--store" in done.stderr
    assert "workers of DataflowRunner do not reach it" in done.stderr
