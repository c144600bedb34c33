"""Reading TF-Slim checkpoints."""

import hashlib
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from hubbeam.modules.checkpoints import EMA, open_checkpoint
from hubbeam.modules.errors import ConfigError

VALUES = {
    "Net/Conv/weights": np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3),
    "Net/Conv/biases": np.array([1, 2, 3], np.float32),
    f"Net/Conv/weights/{EMA}": np.full((1, 1, 2, 3), 7, np.float32),
    "global_step": np.array(12, np.int64),
}
WANTED = {"Net/Conv/biases": (3,), "Net/Conv/weights": (1, 1, 2, 3)}


def save(prefix: Path, values: dict[str, np.ndarray] = VALUES) -> Path:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    names = sorted(values)
    tf.raw_ops.SaveV2(
        prefix=str(prefix), tensor_names=names, shape_and_slices=[""] * len(names),
        tensors=[values[n] for n in names],
    )  # fmt: skip
    return prefix


def pack(folder: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, ".")
    return archive


def test_prefix_index_folder_and_archive(tmp_path: Path) -> None:
    prefix = save(tmp_path / "a" / "net.ckpt")
    (prefix.parent / "net.tflite").write_bytes(b"something else")
    archive = pack(prefix.parent, tmp_path / "net.tgz")
    sums = set()
    for path in (prefix, f"{prefix}.index", prefix.parent, archive):
        with open_checkpoint(path) as checkpoint:
            values = checkpoint.read(WANTED)
            sums.add(checkpoint.sha256)
        assert list(values) == list(WANTED)
        np.testing.assert_array_equal(values["Net/Conv/biases"], [1, 2, 3])
    assert hashlib.sha256(archive.read_bytes()).hexdigest() in sums
    assert len(sums) == 2  # the archive's, and one for the bare files however they are named


def test_moving_averages_are_preferred(tmp_path: Path) -> None:
    with open_checkpoint(save(tmp_path / "net.ckpt")) as checkpoint:
        values = checkpoint.read(WANTED)
        assert f"Net/Conv/weights/{EMA}" not in checkpoint.shapes
    np.testing.assert_array_equal(values["Net/Conv/weights"], 7)
    np.testing.assert_array_equal(values["Net/Conv/biases"], [1, 2, 3])


def test_one_file_format_of_old_checkpoints(tmp_path: Path) -> None:
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.compat.v1.get_variable("Net/x", initializer=np.float32([5, 6]), use_resource=False)
        session.run(tf.compat.v1.global_variables_initializer())
        saver = tf.compat.v1.train.Saver(write_version=tf.compat.v1.train.SaverDef.V1)
        saver.save(session, str(tmp_path / "net.ckpt"), write_meta_graph=False)
    assert (tmp_path / "net.ckpt").is_file()
    archive = pack(tmp_path, tmp_path.with_suffix(".tar.gz"))
    for path in (tmp_path / "net.ckpt", archive):
        with open_checkpoint(path, "net.ckpt") as checkpoint:
            np.testing.assert_array_equal(checkpoint.read({"Net/x": (2,)})["Net/x"], [5, 6])


def test_all_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    wanted = {**WANTED, "Net/a": (1,), "Net/b": (), "Net/Conv/biases": (4,), "global_step": ()}
    with (
        open_checkpoint(save(tmp_path / "net.ckpt")) as checkpoint,
        pytest.raises(ConfigError) as error,
    ):
        checkpoint.read(wanted)
    text = str(error.value)
    assert "4 of 5 variables do not fit" in text
    assert "Net/a [1] is missing" in text
    assert "Net/b [] is missing" in text
    assert "Net/Conv/biases is [3], not [4]" in text
    assert "global_step is int64, not float32" in text
    assert "Net/Conv/weights" not in text


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    def message(path: Path, prefix: str | None = None) -> str:
        with pytest.raises(ConfigError) as error, open_checkpoint(path, prefix):
            pass
        return str(error.value)

    assert "there is no checkpoint" in message(tmp_path / "none.ckpt")
    assert "there is no checkpoint in" in message(tmp_path)
    (tmp_path / "text.ckpt").write_text("no checkpoint at all")
    assert "cannot be read" in message(tmp_path / "text.ckpt")
    (tmp_path / "page.tgz").write_text("<html>404</html>")
    assert "page.tgz" in message(tmp_path / "page.tgz")


def test_several_checkpoints_need_a_name(tmp_path: Path) -> None:
    save(tmp_path / "m" / "a.ckpt")
    save(tmp_path / "m" / "b.ckpt", {"Net/Conv/biases": np.array([9, 9, 9], np.float32)})
    archive = pack(tmp_path / "m", tmp_path / "both.tar.gz")
    with (
        pytest.raises(ConfigError, match=r"several checkpoints: a\.ckpt, b\.ckpt"),
        open_checkpoint(archive),
    ):
        pass
    with open_checkpoint(archive, "b.ckpt") as checkpoint:
        assert checkpoint.read({"Net/Conv/biases": (3,)})["Net/Conv/biases"].tolist() == [9] * 3


def test_archive_that_leaves_its_folder_is_refused(tmp_path: Path) -> None:
    prefix = save(tmp_path / "a" / "net.ckpt")
    with tarfile.open(tmp_path / "evil.tgz", "w:gz") as tar:
        tar.add(f"{prefix}.index", "../net.ckpt.index")
    with (
        pytest.raises(ConfigError, match="leaves its folder"),
        open_checkpoint(tmp_path / "evil.tgz"),
    ):
        pass
