"""The engine of a module: the fastest that agrees with TensorFlow, found once and kept.

What is found is kept in the store beside the module, by what it depends on: the versions of the
engines, the processor, the number of threads. It is found in a process of its own, so that a
process which does not run TensorFlow does not hold it either.
"""

import copy
import hashlib
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import ValidationError

from hubbeam.modules.engines.base import (
    CHECK,
    COSINE_MIN,
    Engine,
    EngineChoice,
    agreement,
    check_pictures,
)
from hubbeam.modules.engines.openvino import (
    CONVERSION,
    Converted,
    OpenVINOEngine,
    convert,
    import_openvino,
)
from hubbeam.modules.engines.tensorflow import TensorFlowEngine, import_tensorflow
from hubbeam.modules.errors import ConfigError, RunError
from hubbeam.modules.spec import ResolvedModule
from hubbeam.modules.store import Store

log = logging.getLogger(__name__)

ENGINES = ("auto", "tensorflow", "openvino", "openvino-bf16")
"""What `choose_engine` takes. ``auto`` never takes ``openvino-bf16``, which costs accuracy."""

# One image at a time is as fast as two or four where OpenVINO has the machine for itself, and 1 to
# 7 % slower beside decoding, which pushes the weights out of the cache.
_BATCHES = {"tensorflow": (1, 4, 8), "openvino": (2, 4, 8), "openvino-bf16": (2, 4, 8)}
_PICTURES = 8
_ROUNDS = 7
_ROUND_SECONDS = 0.25


def choose_engine(
    store: Store, module: ResolvedModule, engine: str = "auto", *, threads: int
) -> EngineChoice:
    """Returns the engine of a module, found now if it was not found before.

    Args:
      store: where the module is, and where the choice is kept.
      module: the module.
      engine: one of `ENGINES`; ``auto`` is the fastest that is installed and agrees with
        TensorFlow on `check_pictures`, at least `COSINE_MIN` on each.
      threads: threads that will run the engine in one process.

    Raises:
      ConfigError: there is no such engine, or it is not installed.
      RunError: the module cannot be loaded, or the engine that was named does not agree.
    """
    if engine not in ENGINES:
        raise ConfigError(f"there is no engine {engine!r}; there are {', '.join(ENGINES)}")
    if engine.startswith("openvino") and not _installed("openvino"):
        import_openvino()
    name = _choice_name(module, engine, threads)
    kept = store.get_artifact(module, name)
    if kept is not None:
        try:
            return EngineChoice.model_validate_json(kept)
        except ValidationError:
            log.warning("module %s: the kept choice %s is damaged, made again", module.name, name)
    log.info(
        "module %s: comparing engines for this processor, about half a minute",
        module.name,
    )
    choice = _in_child(store, module, engine, threads)
    try:
        store.put_artifact(module, name, choice.model_dump_json(indent=2).encode())
    except OSError as e:
        log.warning("module %s: its engine is not kept, for the store: %s", module.name, e)
    return choice


def load_engine(
    store: Store,
    module: ResolvedModule,
    choice: EngineChoice | str = "auto",
    *,
    threads: int,
) -> Engine:
    """Loads a module into the engine that runs it. Called once per process.

    Whatever was chosen, wherever, is compared here with TensorFlow's vectors, which are kept with
    the converted module: that is cheap, and needs no TensorFlow.

    Args:
      store: where the module is.
      module: the module.
      choice: what `choose_engine` returned, perhaps on another machine, or what it takes.
      threads: threads that will call the engine at once; each computes on one core.

    Returns:
      The engine. Where one that was chosen by ``auto`` cannot be had or does not agree on this
      machine, TensorFlow, with a warning.

    Raises:
      ConfigError: the engine that was named is not installed.
      RunError: the engine that was named does not agree, or the module cannot be loaded.
    """
    if isinstance(choice, str):
        choice = choose_engine(store, module, choice, threads=threads)
    if choice.engine == "tensorflow":
        return TensorFlowEngine(
            store.local_folder(module), module, batch_size=choice.batch_size, streams=threads
        )
    try:
        converted = _converted(store, module)
        engine = OpenVINOEngine(
            converted,
            module,
            batch_size=choice.batch_size,
            streams=threads,
            precision="bf16" if choice.precision == "bf16" else "f32",
        )
        if choice.precision == "f32":
            _must_agree(engine, module, converted.reference)
        return engine
    except (ConfigError, RunError) as e:
        if choice.pinned:
            raise
        log.warning("%s; TensorFlow is used instead", e)
        return TensorFlowEngine(store.local_folder(module), module, streams=threads)


def import_engine(choice: EngineChoice) -> None:
    """Imports the library that a choice names, where it is installed."""
    with suppress(ConfigError):  # `load_engine` says what is missing
        (import_tensorflow if choice.engine == "tensorflow" else import_openvino)()


def cpu_name() -> str:
    """Names this machine's processor, its vector instructions, and the cores."""
    model, flags = platform.processor() or platform.machine(), set[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    except OSError:
        pass
    vector = sorted(
        flag
        for flag in flags
        if flag.startswith(("avx", "amx", "sve", "asimd", "bf16", "i8mm")) or flag == "fma"
    )
    return f"{model}, {os.cpu_count()} cores, {' '.join(vector)}".rstrip(", ")


def _installed(package: str) -> str | None:
    """Returns the version of a package without importing it, None if it is not there."""
    if util.find_spec(package) is None:
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # e.g. tensorflow-cpu
        return "unknown"


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _which(module: ResolvedModule) -> list[object]:
    return [CHECK, CONVERSION, module.tags, module.signature, module.input, module.output]


def _choice_name(module: ResolvedModule, engine: str, threads: int) -> str:
    versions = [_installed("tensorflow"), _installed("openvino")]
    return f"engine-{engine}-{_digest(_which(module), versions, cpu_name(), threads)}.json"


def _converted(
    store: Store, module: ResolvedModule, reference: np.ndarray | None = None
) -> Converted:
    """Returns the module in OpenVINO's form, converted now if it was not before."""
    ov = import_openvino()
    name = f"openvino-{ov.__version__.split('-')[0]}-{_digest(_which(module))}.zip"
    kept = store.get_artifact(module, name)
    if kept is not None:
        try:
            return Converted.unpack(kept)
        except ValueError as e:
            log.warning("module %s: %s is damaged (%s), made again", module.name, name, e)
    folder = store.local_folder(module)
    if reference is None:
        reference = TensorFlowEngine(folder, module).run(check_pictures(module.image_size))
    converted = convert(folder, module, reference)
    try:
        store.put_artifact(module, name, converted.pack())
    except OSError as e:
        log.warning("module %s: its conversion is not kept, for the store: %s", module.name, e)
    return converted


def _must_agree(engine: Engine, module: ResolvedModule, reference: np.ndarray) -> float:
    pictures = check_pictures(module.image_size)
    with ThreadPoolExecutor(engine.streams) as pool:  # each makes itself ready
        found = pool.map(engine.run, [pictures] * engine.streams)
        cosine = min(agreement(vectors, reference) for vectors in found)
    if cosine < COSINE_MIN:
        raise RunError(
            f"module {module.name}: engine {engine.name} {engine.version} does not agree with "
            f"TensorFlow on this machine, cosine {cosine:.7f} where {COSINE_MIN} is needed"
        )
    return cosine


class _Candidate(NamedTuple):
    engine: Engine
    cosine: float


def _choose(store: Store, module: ResolvedModule, engine: str, threads: int) -> EngineChoice:
    """Compares and measures engines, see `choose_engine`."""
    candidates: list[_Candidate] = []
    reference, refused = None, ""
    if engine in ("auto", "tensorflow"):
        base = TensorFlowEngine(store.local_folder(module), module, streams=threads)
        reference = base.run(check_pictures(module.image_size))
        for batch_size in _BATCHES["tensorflow"]:
            sized = copy.copy(base)  # the same session, cut into other batches
            sized.batch_size = batch_size
            candidates.append(_Candidate(sized, 1.0))
    if engine.startswith("openvino") or (engine == "auto" and _installed("openvino")):
        try:
            candidates += _openvino(store, module, engine, threads, reference)
        except (ConfigError, RunError) as e:
            if engine != "auto":
                raise
            refused = f"; refused: {e}"
    rates = _measure([candidate.engine for candidate in candidates], module.image_size)
    ranked = sorted(zip(rates, candidates, strict=True), key=lambda pair: -pair[0])
    rate, (chosen, cosine) = ranked[0]
    measured: dict[str, float] = {}
    for each, candidate in ranked:
        measured.setdefault(candidate.engine.name, round(each, 1))
    figures = ", ".join(f"{name} {rate:.0f}" for name, rate in measured.items())
    why = "named by the user" if engine != "auto" else "the fastest that agrees with TensorFlow"
    if chosen.name == "openvino-bf16":
        why += f", costs accuracy: cosine {cosine:.5f} to TensorFlow"
    return EngineChoice(
        engine=chosen.name,
        version=chosen.version,
        precision="bf16" if chosen.name == "openvino-bf16" else "f32",
        batch_size=chosen.batch_size,
        streams=chosen.streams,
        cosine_min=cosine,
        images_per_second=round(rate, 1),
        cpu=cpu_name(),
        pinned=engine != "auto",
        why=f"{why} ({figures} images/s{refused})",
        measured=measured,
    )


def _openvino(
    store: Store,
    module: ResolvedModule,
    engine: str,
    threads: int,
    reference: np.ndarray | None,
) -> list[_Candidate]:
    converted = _converted(store, module, reference)
    found = []
    for batch_size in _BATCHES["openvino"]:
        sized = OpenVINOEngine(
            converted,
            module,
            batch_size=batch_size,
            streams=threads,
            precision="bf16" if engine == "openvino-bf16" else "f32",
        )
        if engine == "openvino-bf16":
            pictures = check_pictures(module.image_size)
            cosine = agreement(sized.run(pictures), converted.reference)
        else:
            cosine = _must_agree(sized, module, converted.reference)
        found.append(_Candidate(sized, cosine))
    return found


def _measure(engines: Sequence[Engine], image_size: tuple[int, int]) -> list[float]:
    """Returns the images/s of each engine with all its streams busy, each on a core of its own.

    Counted by the CPU seconds of this process, not by the clock: a choice that is made while the
    machine is busy must do for quiet days. The engines take turns, and the median counts: the best
    turn is luck, and told 2 pictures at a time from 4 wrongly, which costs 1 % of a run.
    """
    pictures = check_pictures(image_size)
    batch = np.resize(pictures, (_PICTURES, *pictures.shape[1:]))
    for engine in engines:
        _rate(engine, batch, 0.0)  # warms up
    turns = [[_rate(e, batch, _ROUND_SECONDS) for e in engines] for _ in range(_ROUNDS)]
    return [statistics.median(rates) for rates in zip(*turns, strict=True)]


def _rate(engine: Engine, batch: np.ndarray, seconds: float) -> float:
    begin = time.perf_counter()
    begin_cpu = time.process_time()

    def work(_: int) -> int:
        done = 0
        while not done or time.perf_counter() - begin < seconds:
            engine.run(batch)
            done += len(batch)
        return done

    with ThreadPoolExecutor(engine.streams) as pool:
        done = sum(pool.map(work, range(engine.streams)))
    return engine.streams * done / (time.process_time() - begin_cpu)


def _in_child(store: Store, module: ResolvedModule, engine: str, threads: int) -> EngineChoice:
    task = {
        "store": store.root,
        "module": module.model_dump(mode="json"),
        "engine": engine,
        "threads": threads,
    }
    # Nothing in the working directory shall pass for a library.
    code = (
        "import sys; sys.path = [p for p in sys.path if p]; "
        "from hubbeam.modules.engines import choose; choose.child()"
    )
    child = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=False,
    )
    if child.stderr:
        log.debug("module %s: comparing engines wrote: %s", module.name, child.stderr)
    answer = child.stdout.rpartition("\n")[2]
    if child.returncode or not answer.startswith("{"):
        last = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
        raise RunError(f"module {module.name}: comparing engines failed: {last[0]}")
    result = json.loads(answer)
    if "error" in result:
        kind = ConfigError if result["error"] == "ConfigError" else RunError
        raise kind(result["message"])
    return EngineChoice.model_validate(result)


def child() -> None:
    """Does the work of `choose_engine` for the process that started this one."""
    task = json.load(sys.stdin)
    try:
        choice = _choose(
            Store(task["store"]),
            ResolvedModule.model_validate(task["module"]),
            task["engine"],
            task["threads"],
        )
    except (ConfigError, RunError) as e:
        sys.stdout.write("\n" + json.dumps({"error": type(e).__name__, "message": str(e)}))
    else:
        sys.stdout.write("\n" + choice.model_dump_json())
