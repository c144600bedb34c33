"""Which Beam runner a job goes to, and with which options."""

import gc
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from hubbeam.modules.errors import ConfigError, RunError
from hubbeam.modules.stderr import stderr_into
from hubbeam.pipelines.options import ExtractOptions
from hubbeam.transforms.process import cores

LOCAL = ("local", "directrunner", "direct", "fnapirunner", "inmemoryrunner")
"""Names of the pinned local runner: `DirectRunner` would first try to download another one."""


@dataclass(frozen=True)
class Runner:
    """A runner and its options.

    Attributes:
      name: as the user gave it.
      args: Beam's command line.
      is_local: whether shards are computed on this machine.
      processes: worker processes on each machine; 0 means one for each core.
      workers: shards that may be computed at once, as far as is known.
    """

    name: str
    args: tuple[str, ...]
    is_local: bool
    processes: int
    workers: int

    @classmethod
    def from_options(cls, options: ExtractOptions, beam_args: list[str]) -> "Runner":
        """Reads the settings and the options that go to Beam untouched.

        Raises:
          ConfigError: there is no such runner, or Beam refuses an option's value. Options that
            Beam does not know pass, for they may be a runner's own.
        """
        args = [*options.beam, *beam_args]
        given = [arg for arg in args if arg == "--runner" or arg.startswith("--runner=")]
        if given and options.runner != "local":
            raise ConfigError("--runner is given twice: as a flag and after `--`")
        name = _value(args, "--runner") or options.runner
        args = _without(args, "--runner")
        is_local = name.lower() in LOCAL
        known = {known.lower() for known in StandardOptions.KNOWN_RUNNER_NAMES}
        if not is_local and "." not in name and name.lower() not in known:
            names = ", ".join(["local", *StandardOptions.KNOWN_RUNNER_NAMES])
            raise ConfigError(f"no runner {name!r}: there are {names}")
        for flag, value in (
            ("--project", options.project),
            ("--region", options.region),
            ("--temp_location", options.temp_location),
        ):
            if value is not None:
                args.append(f"{flag}={value}")
        if options.workers is not None and not is_local:
            args.append(f"--max_num_workers={options.workers}")
        elif options.workers is not None and options.workers > 1:  # one is this process itself
            args.append("--direct_running_mode=multi_processing")
            args.append(f"--direct_num_workers={options.workers}")
        parsed = _parse(args)
        if is_local:
            count = parsed.get("direct_num_workers", 1) or cores()  # 0 is Beam's "all"
            parallel = parsed.get("direct_running_mode") == "multi_processing"
            return cls(name, tuple(args), True, count if parallel else 1, count)
        experiments = parsed.get("experiments") or []
        one_process = "no_use_multiple_sdk_containers" in experiments
        workers = parsed.get("max_num_workers") or parsed.get("num_workers") or 8
        return cls(name, tuple(args), False, 1 if one_process else 0, workers)

    def run(self, build: Callable[[beam.Pipeline], None]) -> None:
        """Builds a pipeline, runs it and waits for its end.

        Args:
          build: puts the transforms into the pipeline.
        """
        options = PipelineOptions(list(self.args))
        pipeline = beam.Pipeline(
            runner=FnApiRunner() if self.is_local else self.name, options=options
        )
        build(pipeline)
        with _worker_processes() if self.processes > 1 else _imports_uncollected():
            pipeline.run().wait_until_finish()


@contextmanager
def _imports_uncollected() -> Iterator[None]:
    """Keeps what exists by now out of the garbage collections of a run.

    To go through the objects of Beam's modules takes 0.13 s, with the interpreter's lock held, and
    comes about once in 10,000 images.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _worker_processes() -> Iterator[None]:
    """Keeps the worker processes' chatter out of sight, and the working directory out of theirs.

    A ``random.py`` there would end them at their start, and Beam would wait for them for ever
    (Python 3.10 does not know PYTHONSAFEPATH).
    """
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    told = logging.getLogger().isEnabledFor(logging.INFO)
    try:
        with (
            Path(os.devnull).open("wb") as nowhere,
            nullcontext() if told else stderr_into(nowhere),
            _until_one_dies(),
        ):
            yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


@contextmanager
def _until_one_dies() -> Iterator[None]:
    """Ends the run when a worker process dies: Beam would wait for its answer for ever.

    Beam learns of it in a thread of its own, and only `threading.excepthook` hears of that. Only
    the main thread can be made to stop waiting: a run in another one waits as before.

    Raises:
      RunError: a worker process died. The others are ended too.
    """
    main = threading.main_thread()
    if threading.current_thread() is not main:
        yield
        return
    import psutil  # most runs have no worker processes

    died: list[str] = []

    def heard(args: threading.ExceptHookArgs) -> None:
        text, _, code = str(args.exc_value).rpartition(" ")
        if text != "Worker subprocess exited with return code":
            hook(args)
        elif code not in _INTERRUPTED and not died:
            died.append(code)
            signal.pthread_kill(main.ident or 0, signal.SIGUSR1)

    def stop(*_: object) -> None:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if _WORKER in process.cmdline():
                    process.kill()
        raise RunError(
            f"a worker process died (exit code {died[0]}; 137 or -9 mostly means that memory ran "
            "out: take fewer --workers); the same command takes the run up again"
        )

    hook, handler = threading.excepthook, signal.signal(signal.SIGUSR1, stop)
    threading.excepthook = heard
    try:
        yield
    finally:
        threading.excepthook = hook
        signal.signal(signal.SIGUSR1, handler or signal.SIG_DFL)  # None: not set by Python


_WORKER = "apache_beam.runners.worker.sdk_worker_main"
_INTERRUPTED = ("-2", "130")  # what Ctrl-C leaves, of a process and of its shell


def _parse(args: list[str]) -> dict[str, Any]:
    try:
        options = PipelineOptions(args)
        known = options.get_all_options(drop_default=False, add_extra_args_fn=None)
    except SystemExit as error:
        raise ConfigError(f"Beam does not understand its options: {' '.join(args)}") from error
    return dict(known)


def _value(args: list[str], flag: str) -> str | None:
    for position, arg in enumerate(args):
        if arg.startswith(f"{flag}="):
            return arg.partition("=")[2]
        if arg == flag and position + 1 < len(args):
            return args[position + 1]
    return None


def _without(args: list[str], flag: str) -> list[str]:
    kept: list[str] = []
    skip = False
    for arg in args:
        if skip:
            skip = False
        elif arg == flag:
            skip = True
        elif not arg.startswith(f"{flag}="):
            kept.append(arg)
    return kept
