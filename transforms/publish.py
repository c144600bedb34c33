"""The last step of a run: put the datasets in place, then say that they are whole."""

import json
import re
import time
from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import apache_beam as beam
from pydantic import BaseModel, ConfigDict

from hubbeam.modules.errors import ConfigError, RunError
from hubbeam.transforms import files
from hubbeam.transforms.job import RUN_FILE, SUCCESS, WORK_FOLDER, ExtractJob
from hubbeam.transforms.verify import ShardReport
from hubbeam.transforms.write import METADATA_KEY, dataset_metadata, tfrecord_features

SCHEMA_FILE = "schema.json"
_OWN_FILE = re.compile(
    r"(vectors|rejects)-\d{5,}-of-\d{5,}\.(parquet|tfrecord(\.gz)?)|_SUCCESS|schema\.json"
)


class RunReport(BaseModel):
    """What a run came to; published as ``run.json``.

    Attributes:
      hubbeam: version that wrote it.
      plan: hash that every shard of the run carries.
      published: whether the datasets were published; False when too many images were rejected.
      started: ISO 8601, UTC.
      finished: ISO 8601, UTC.
      seconds: from the start of the pipeline to the publication.
      images_per_second: images computed in this run by its seconds.
      listed: images of the plan.
      duplicates: names that were listed more than once and dropped.
      size_bytes: bytes of the listed images where listing told them.
      shards: shards of each dataset.
      shards_kept: shards that an earlier, unfinished run had finished.
      images_kept: images of those.
      rejected_images: images that gave no vector of at least one module.
      rejects: rejects by reason (an image that fails in two modules counts twice).
      modules: by name: handle, sha256, engine, counts, and the list of shards with rows and
        checksums.
      reject_files: files of rejects with rows and checksums.
      preset: how pictures became the module's input.
      versions: of the packages that decide the vectors.
      options: the options of the run.
    """

    model_config = ConfigDict(frozen=True)

    hubbeam: str
    plan: str
    published: bool
    started: str
    finished: str
    seconds: float
    images_per_second: float
    listed: int
    duplicates: int
    size_bytes: int
    shards: int
    shards_kept: int
    images_kept: int
    rejected_images: int
    rejects: dict[str, int]
    modules: dict[str, dict[str, Any]]
    reject_files: list[dict[str, Any]]
    preset: dict[str, Any]
    versions: dict[str, str]
    options: dict[str, Any]

    @property
    def rejected_fraction(self) -> float:
        """Rejected images by listed images."""
        return self.rejected_images / self.listed


def outcome_path(job: ExtractJob) -> str:
    """Path of the report of a run that was not published."""
    return files.join(job.work, "outcome.json")


def run_path(output: str) -> str:
    """Path of the report of a published run."""
    return files.join(output, RUN_FILE)


def publish(job: ExtractJob, reports: Iterable[ShardReport]) -> RunReport:
    """Proves that nothing is lost, and publishes. May run twice, and go on where it was cut off.

    Args:
      job: the run.
      reports: one for each shard, in any order.

    Returns:
      The report, also written as ``run.json``, or where too many images were rejected only in the
      work folder.

    Raises:
      RunError: the reports do not account for every shard and every image of the plan.
    """
    ordered = sorted(reports, key=lambda report: report.shard)
    report = summarise(job, ordered)
    if not report.published:
        files.write_bytes(outcome_path(job), _to_json(report.model_dump(mode="json")))
        return report
    if job.root != job.output:
        _take_the_place(job, ordered)
    for module in job.modules:
        if job.planned.meaning.format == "tfrecord":
            schema = {
                "features": tfrecord_features(module.width),
                "compression": job.planned.meaning.compression,
                METADATA_KEY: dataset_metadata(job, module),
            }
            files.write_bytes(files.join(job.output, module.name, SCHEMA_FILE), _to_json(schema))
    files.write_bytes(run_path(job.output), _to_json(report.model_dump(mode="json")))
    for module in job.modules:
        files.write_bytes(files.join(job.output, module.name, SUCCESS), b"")
    drop_work(job.output)
    return report


def job_path(output: str) -> str:
    """Path of the `PlannedRun` of an unfinished run."""
    return files.join(output, WORK_FOLDER, "job.json")


def drop_work(output: str) -> None:
    """Deletes the work folder; the job file first, so that no run takes up half a plan."""
    files.delete(job_path(output))
    files.delete_folder(files.join(output, WORK_FOLDER))


def _to_json(data: Any) -> bytes:
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()


def summarise(job: ExtractJob, reports: list[ShardReport]) -> RunReport:
    """Adds up the shards' reports.

    Args:
      job: the run.
      reports: one for each shard, by shard.

    Raises:
      RunError: a shard is missing, or images are.
    """
    images = sum(report.images for report in reports)
    if [report.shard for report in reports] != list(range(job.shards)):
        raise RunError(f"{job.output}: {len(reports)} of {job.shards} shards were verified")
    if images != job.planned.images:
        raise RunError(f"{job.output}: the plan has {job.planned.images} images, not {images}")
    now = time.time()
    kept = [report for report in reports if report.kept]
    images_kept = sum(report.images for report in kept)
    rejected = sum(report.rejected_images for report in reports)
    modules: dict[str, dict[str, Any]] = {}
    for module, choice in zip(job.modules, job.engines, strict=True):
        shards = [report.vectors[module.name] for report in reports]
        reasons: Counter[str] = Counter()
        for report in reports:
            reasons.update(report.rejects_by_reason[module.name])
        modules[module.name] = {
            "handle": module.handle,
            "sha256": module.sha256,
            "signature": module.signature,
            "width": module.width,
            "engine": choice.model_dump(mode="json"),
            "engines_used": dict(Counter(report.engines[module.name] for report in reports)),
            "vectors": sum(shard.rows for shard in shards),
            "rejects": sum(reasons.values()),
            "rejects_by_reason": dict(sorted(reasons.items())),
            "size_bytes": sum(shard.size_bytes for shard in shards),
            "shards": [shard.model_dump() for shard in shards],
        }
    rejects: Counter[str] = Counter()
    for report in reports:
        by_module = report.rejects_by_reason.values()
        for reason in {reason for reasons in by_module for reason in reasons}:
            rejects[reason] += max(reasons.get(reason, 0) for reasons in by_module)
    seconds = now - job.started
    return RunReport(
        hubbeam=version("hubbeam"),
        plan=job.planned.plan_id,
        published=rejected <= job.max_reject_fraction * images,
        started=_iso(job.started),
        finished=_iso(now),
        seconds=round(seconds, 3),
        images_per_second=round((images - images_kept) / seconds, 3),
        listed=images,
        duplicates=job.planned.duplicates,
        size_bytes=job.planned.size_bytes,
        shards=job.shards,
        shards_kept=len(kept),
        images_kept=images_kept,
        rejected_images=rejected,
        rejects=dict(sorted(rejects.items())),
        modules=modules,
        reject_files=[report.rejects.model_dump() for report in reports if report.rejects],
        preset=job.planned.meaning.preset.stamp(),
        versions={
            name: version(name)
            for name in ("apache-beam", "numpy", "pillow", "pyarrow", "tensorflow")
        },
        options=job.options,
    )


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")


def _take_the_place(job: ExtractJob, reports: list[ShardReport]) -> None:
    """Moves the new files over those of the run that the output still holds.

    What is moved already is passed over, so that this can be cut off and done again.
    """
    new = {file.path for report in reports for file in report.vectors.values()}
    new |= {report.rejects.path for report in reports if report.rejects}
    old = set(published_files(job.output, (module.name for module in job.modules)))
    files.write_bytes(job.moving, b"")
    for path in old:
        if not _is_data(path):
            files.delete(files.join(job.output, path))
    for path in sorted(new):
        source = files.join(job.root, path)
        if files.exists(source):
            files.move(source, files.join(job.output, path))
        elif not files.exists(files.join(job.output, path)):
            raise RunError(f"{source}: vanished while it was published")
    for path in old - new:
        if _is_data(path):
            files.delete(files.join(job.output, path))


def _is_data(path: str) -> bool:
    return not path.endswith((SUCCESS, RUN_FILE))


def published_files(output: str, modules: Iterable[str]) -> list[str]:
    """Lists the files of hubbeam's in an output, without the work folder.

    Args:
      output: the folder.
      modules: names of modules to look for, besides those that a ``run.json`` there tells of.

    Returns:
      Paths below the output.
    """
    folders = {*modules, "rejects"}
    found = []
    if files.exists(run_path(output)):
        found.append(RUN_FILE)
        try:
            folders |= set(json.loads(files.read_bytes(run_path(output)))["modules"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{run_path(output)} is no report of a run: move it away") from error
    for folder in sorted(folders):
        names = files.list_names(files.join(output, folder))
        found += [f"{folder}/{name}" for name in names if _OWN_FILE.fullmatch(name)]
    return found


@beam.typehints.with_input_types(ShardReport)
class Publish(beam.PTransform):
    """Reports of all shards in, the report of the run out, after it was published."""

    def __init__(self, job: ExtractJob):
        super().__init__()
        self._job = job

    def expand(self, reports: beam.PCollection[ShardReport]) -> beam.PCollection[RunReport]:
        job = self._job
        return (
            reports
            | beam.WithKeys("run")
            | "Together" >> beam.GroupByKey()
            | "Publish"
            >> beam.MapTuple(lambda _, reports: publish(job, reports)).with_output_types(RunReport)
        )
