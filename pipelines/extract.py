"""The main job: image files in, shards of feature vectors out.

`run_extract` is the whole job: resolve the modules, plan, run the pipeline of `build_pipeline`,
report.
"""

import fcntl
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import apache_beam as beam
from pydantic import BaseModel, ConfigDict, ValidationError

from hubbeam.modules.download import Progress
from hubbeam.modules.engines import ENGINES, choose_engine
from hubbeam.modules.engines.base import EngineChoice
from hubbeam.modules.errors import ConfigError, RunError
from hubbeam.modules.images import Limits
from hubbeam.modules.presets import load_preset
from hubbeam.modules.store import Store
from hubbeam.pipelines.options import ExtractOptions
from hubbeam.pipelines.runners import Runner
from hubbeam.transforms import files
from hubbeam.transforms.job import WORK_FOLDER, ExtractJob, Meaning, PlannedRun
from hubbeam.transforms.listing import list_images, local_path
from hubbeam.transforms.plan import write_plan
from hubbeam.transforms.process import this_process, threads_for
from hubbeam.transforms.publish import (
    Publish,
    RunReport,
    drop_work,
    job_path,
    outcome_path,
    published_files,
    run_path,
)
from hubbeam.transforms.shard import ExtractShards
from hubbeam.transforms.verify import VerifyShards


def build_pipeline(pipeline: beam.Pipeline, job: ExtractJob) -> None:
    """The job as Beam sees it: shards out to the workers, their proofs back, publication."""
    _ = (
        pipeline
        | "Shards" >> beam.Create([(shard, None) for shard in range(job.shards)], reshuffle=False)
        | "Extract" >> ExtractShards(job)
        | "Verify" >> VerifyShards(job)
        | "Publish" >> Publish(job)
    )


class DryRun(BaseModel):
    """What a run would do.

    Attributes:
      planned: the plan.
      engines: engine of each module.
      resumes: whether it takes up a plan that stands in the output.
    """

    model_config = ConfigDict(frozen=True)

    planned: PlannedRun
    engines: tuple[EngineChoice, ...]
    resumes: bool


_LOGGER = logging.getLogger(__name__)

Fetching = Callable[[], AbstractContextManager[Progress | None]]
"""Shows downloads of modules while it is entered."""

Watch = Callable[[ExtractJob, str], AbstractContextManager[None]]
"""Shows the progress that is noted in a folder while it is entered."""


def dry_run(
    options: ExtractOptions, beam_args: list[str], fetching: Fetching = nullcontext
) -> DryRun:
    """Resolves, lists and plans, and leaves nothing behind in the output.

    Raises:
      ConfigError: whatever would stop the run before it starts.
    """
    runner = Runner.from_options(options, beam_args)
    meaning = resolve(options, runner, fetching)
    output = absolute(options.output)
    found, replaces = _look_at(output, meaning, options.overwrite)
    with tempfile.TemporaryDirectory() as folder:
        planned = found or _plan(meaning, options, folder, replaces, runner)
    return DryRun(
        planned=planned,
        engines=_choose_engines(meaning, options, runner),
        resumes=found is not None,
    )


def run_extract(
    options: ExtractOptions,
    beam_args: list[str],
    watch: Watch | None = None,
    fetching: Fetching = nullcontext,
) -> RunReport:
    """Runs the job.

    Args:
      options: the settings.
      beam_args: options for Beam, untouched.
      watch: called as ``watch(job, progress folder)``, gives a context manager that is entered
        while a local run works (the progress bar).
      fetching: gives a context manager that is entered while modules are fetched.

    Returns:
      The report; its ``published`` is False when too many images were rejected.

    Raises:
      ConfigError: bad settings or input, found before anything ran.
      RunError: the run failed; the same command takes it up again.
    """
    runner = Runner.from_options(options, beam_args)
    meaning = resolve(options, runner, fetching)
    output = absolute(options.output)
    with ExitStack() as stack:
        stack.enter_context(_only_one(output))
        planned, replaces = _look_at(output, meaning, options.overwrite)
        engines = _choose_engines(meaning, options, runner)
        store = Store(options.store).root
        if runner.is_local and runner.processes == 1:  # they are ready when the pipeline is
            for module, choice in zip(meaning.modules, engines, strict=True):
                this_process().load(module, choice, store)
        if planned is None:
            planned = _plan_in(output, meaning, options, replaces, runner)
        else:
            _LOGGER.info("taking up the unfinished run in %s, with its list of images", output)
            _sweep(output, meaning)
        progress = (
            stack.enter_context(tempfile.TemporaryDirectory(prefix="hubbeam-"))
            if runner.is_local
            else None
        )
        job = ExtractJob(
            output=output,
            planned=planned,
            engines=engines,
            store=store,
            batch_size=options.batch_size,
            max_reject_fraction=options.max_reject_fraction,
            processes=runner.processes,
            started=time.time(),
            progress=progress,
            options={
                **options.model_dump(mode="json", exclude={"inputs", "table"}),
                "inputs": meaning.inputs,
                "table": meaning.table,
                "beam": [*options.beam, *beam_args],
            },
        )
        if watch is not None and progress is not None:
            stack.enter_context(watch(job, progress))
        try:
            runner.run(lambda pipeline: build_pipeline(pipeline, job))
        except Exception as error:
            # Beam wraps what ends a worker, Ctrl-C included.
            if "KeyboardInterrupt" in str(error) or "exited with return code -2" in str(error):
                raise KeyboardInterrupt from error
            raise RunError(_first_line(error)) from error
        return _read_report(job)


def resolve(options: ExtractOptions, runner: Runner, fetching: Fetching = nullcontext) -> Meaning:
    """Resolves modules and preset, and checks what can be checked before listing.

    Raises:
      ConfigError: a module, signature or preset cannot be had, or workers could not reach them.
    """
    if options.engine not in ENGINES:
        raise ConfigError(f"no engine {options.engine!r}: there are {', '.join(ENGINES)}")
    store = Store(options.store)
    preset = load_preset(options.preset)
    with fetching() as progress:
        modules = tuple(
            store.resolve(module, signature=options.signature, progress=progress)
            for module in options.modules
        )
    for module in modules:
        if module.untrained:
            _LOGGER.warning("module %s is UNTRAINED: its vectors mean nothing", module.name)
    names = [module.name for module in modules]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"two modules would write the dataset {', '.join(doubled)}: "
            "give one of them a YAML file with another name"
        )
    if "rejects" in names:
        raise ConfigError("a module may not be named `rejects`: that folder is the rejects'")
    if not runner.is_local:
        for what, path in [("--store", modules[0].entry), ("--output", absolute(options.output))]:
            if files.is_local(path):
                raise ConfigError(
                    f"{what} {path} is on this machine, where the workers of {runner.name} do not "
                    "reach it: name a folder on gs://"
                )
    return Meaning(
        # The same words mean other images in another folder.
        inputs=tuple(_printable(_place(text)) for text in options.inputs),
        table=options.table and _printable(_place(options.table)),
        uri_column=options.uri_column,
        modules=modules,
        preset=preset,
        format=options.format,
        compression=options.compression,
        limits=Limits(int(options.max_bytes), options.max_pixels),
        images_per_shard=options.images_per_shard,
        shards=options.shards,
    )


def _printable(path: str) -> str:
    """Escapes the bytes of a name that is not UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _place(path: str) -> str:
    return local_path(path) if files.is_local(path) else path


def absolute(path: str) -> str:
    """Makes a local path absolute, so that workers in other folders understand it."""
    path = path.removeprefix("file://")
    if path != _printable(path):
        raise ConfigError(f"--output {_printable(path)} is not a valid UTF-8 name")
    return str(Path(path).expanduser().absolute()) if files.is_local(path) else path.rstrip("/")


def _choose_engines(
    meaning: Meaning, options: ExtractOptions, runner: Runner
) -> tuple[EngineChoice, ...]:
    store = Store(options.store)
    threads = threads_for(runner.processes)
    return tuple(
        choose_engine(store, module, options.engine, threads=threads) for module in meaning.modules
    )


def _look_at(output: str, meaning: Meaning, overwrite: bool) -> tuple[PlannedRun | None, bool]:
    """Finds the unfinished run to take up, and whether a finished one is to be replaced."""
    try:
        unfinished = _unfinished(output, meaning, overwrite)
        return unfinished, _check_output(output, meaning, unfinished, overwrite)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--output {output!r} cannot be used: {error}") from error


def _unfinished(output: str, meaning: Meaning, overwrite: bool) -> PlannedRun | None:
    """Finds the plan of a run that was not finished here, if it is one of ours."""
    path = job_path(output)
    if not files.exists(path):
        return None
    try:
        planned = PlannedRun.model_validate_json(files.read_bytes(path))
    except ValidationError as error:
        if overwrite:
            return None
        raise ConfigError(
            f"{path} is not of this version of hubbeam: finish that run with the version that "
            "began it, or drop it with --overwrite"
        ) from error
    differences = planned.meaning.differences(meaning)
    if not differences:
        return planned
    if overwrite:
        return None
    raise ConfigError(
        f"{output} holds an unfinished run that differs ({'; '.join(differences)}): finish that "
        "one with its own settings, choose another --output, or drop it with --overwrite"
    )


def _check_output(
    output: str, meaning: Meaning, unfinished: PlannedRun | None, overwrite: bool
) -> bool:
    """Tells whether a finished run stands in the output that is to be replaced."""
    if unfinished is not None:
        return unfinished.replaces
    finished = files.exists(run_path(output))
    if finished and not overwrite:
        raise ConfigError(
            f"{output} already holds a dataset: choose another --output, or replace it with "
            "--overwrite"
        )
    found = published_files(output, _names(meaning))
    if found and not finished and not overwrite:
        raise ConfigError(
            f"{output} holds {found[0]} of a run that nothing is known of: choose another "
            "--output, or replace it with --overwrite"
        )
    return finished


def _names(meaning: Meaning) -> list[str]:
    return [module.name for module in meaning.modules]


def _plan_in(
    output: str, meaning: Meaning, options: ExtractOptions, replaces: bool, runner: Runner
) -> PlannedRun:
    """Plans a new run in the output; the job file, written last, says that the plan is whole."""
    work = files.join(output, WORK_FOLDER)
    # Object stores have no folders: there, deleting one would delete what others put below it.
    fresh = files.is_local(output) and not files.exists(output)
    drop_work(output)
    if not replaces:
        for path in published_files(output, _names(meaning)):
            files.delete(files.join(output, path))
    try:
        planned = _plan(meaning, options, files.join(work, "plan"), replaces, runner)
    except BaseException as error:
        drop_work(output)
        if fresh:
            files.delete_folder(output)
        if isinstance(error, PermissionError):
            raise ConfigError(f"--output {output} cannot be written: {error.strerror}") from error
        raise
    files.write_bytes(job_path(output), planned.model_dump_json(indent=1).encode())
    return planned


def _plan(
    meaning: Meaning, options: ExtractOptions, folder: str, replaces: bool, runner: Runner
) -> PlannedRun:
    summary = write_plan(
        list_images(options.inputs, table=options.table, uri_column=options.uri_column),
        folder,
        images_per_shard=meaning.images_per_shard,
        shards=meaning.shards,
        workers=runner.workers,
    )
    if not summary.images:
        raise ConfigError(f"no images in {meaning.table or ', '.join(meaning.inputs)}")
    return PlannedRun(
        meaning=meaning,
        images=summary.images,
        size_bytes=summary.size_bytes,
        duplicates=summary.duplicates,
        shards=summary.shards,
        plan_sha256=summary.sha256,
        replaces=replaces,
    )


@contextmanager
def _only_one(output: str) -> Iterator[None]:
    """Keeps two local runs from working in one output at once; the lock dies with its process."""
    if not files.is_local(output):
        yield
        return
    name = f"hubbeam-{os.getuid()}-{hashlib.sha256(output.encode()).hexdigest()[:16]}.lock"
    with (Path(tempfile.gettempdir()) / name).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another run is working in {output}: wait for its end") from error
        yield


def _sweep(output: str, meaning: Meaning) -> None:
    """Removes what a killed run left half-written in the folders that are hubbeam's own."""
    if not files.is_local(output):
        return
    leftovers = list(Path(output).glob(f".{run_path('')}.*.tmp"))
    for folder in (*_names(meaning), "rejects"):
        leftovers += Path(output, folder).glob(".*.tmp")
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)


def _first_line(error: BaseException) -> str:
    """Gives the message without the traceback that Beam puts below it."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def rejects_folder(output: str) -> str:
    """Finds the rejects of a run that was not published."""
    planned = PlannedRun.model_validate_json(files.read_bytes(job_path(output)))
    return files.join(planned.root(output), "rejects")


def _read_report(job: ExtractJob) -> RunReport:
    # The outcome first: a run.json with the same plan may be of the run that is being replaced.
    for path in (outcome_path(job), run_path(job.output)):
        if files.exists(path):
            report = RunReport.model_validate_json(files.read_bytes(path))
            if report.plan == job.planned.plan_id:
                return report
    raise RunError(f"{job.output}: the pipeline ended without a report")
