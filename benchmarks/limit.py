"""What the machine can do: decoding alone and the module alone, each with all cores for itself.

A pipeline that does both in turn, on the same cores, and wastes nothing, does 1 / (1/a + 1/b)
images a second. Both parts are measured at the best setting of a search that does not stop at the
settings which hubbeam's own engines offer.
"""

import itertools
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hubbeam.modules.engines import ENGINES, choose_engine, load_engine
from hubbeam.modules.engines.base import agreement, check_pictures
from hubbeam.modules.engines.openvino import (
    CONVERSION,
    Converted,
    convert,
    import_openvino,
    take_bytes,
)
from hubbeam.modules.images import decode
from hubbeam.modules.presets import load_preset
from hubbeam.modules.spec import ResolvedModule
from hubbeam.modules.store import Store
from hubbeam.transforms.process import cores

Setting = dict[str, Any]
"""What was chosen for a part; rides between processes as JSON."""

Batch = Callable[[], int]
"""Does one batch of work in the calling thread and returns the number of images."""

_SEARCH_SECONDS = 0.4
_SEARCH_TURNS = 3
_MOST_BYTES = 256 << 20


class Rate(NamedTuple):
    """What was measured: images/s on all cores, and CPU-seconds per image."""

    images_per_second: float
    cpu_seconds: float


def measure(workers: Sequence[Batch], seconds: float) -> Rate:
    """Runs each worker in a thread of its own until the time is over.

    Args:
      workers: each does one batch a call.
      seconds: how long.
    """
    start = threading.Barrier(len(workers) + 1)

    def work(batch: Batch) -> int:
        start.wait()
        end = time.perf_counter() + seconds
        done = batch()
        while time.perf_counter() < end:
            done += batch()
        return done

    with ThreadPoolExecutor(len(workers)) as pool:
        running = [pool.submit(work, batch) for batch in workers]
        begin, used = time.perf_counter(), _cpu()
        start.wait()
        done = sum(future.result() for future in running)
        elapsed, used = time.perf_counter() - begin, _cpu() - used
    return Rate(done / elapsed, used / done)


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def search(
    settings: Iterable[Setting],
    make: Callable[[Setting], Sequence[Batch]],
    seconds: float = _SEARCH_SECONDS,
) -> list[tuple[float, Setting]]:
    """Measures settings in turns; the best turn counts, for whatever else runs only slows.

    Returns:
      Images/s and setting, the fastest first.
    """
    made = []
    for setting in settings:
        workers = make(setting)
        for worker in workers:  # what is compiled or allocated at the first call
            worker()
        made.append((setting, workers))
    best = [0.0] * len(made)
    for _ in range(_SEARCH_TURNS):
        for number, (_, workers) in enumerate(made):
            best[number] = max(best[number], measure(workers, seconds).images_per_second)
    ranked = sorted(zip(best, made, strict=True), key=lambda pair: -pair[0])
    return [(rate, setting) for rate, (setting, _) in ranked]


def measure_all(
    make: Callable[[Setting], Sequence[Batch]], settings: Sequence[Setting], seconds: float
) -> list[dict[str, float]]:
    """Measures a few settings one after the other, each warmed up.

    Returns:
      `Rate` of each, as a dict.
    """
    rates = []
    for setting in settings:
        workers = make(setting)
        measure(workers, 0.2)
        rates.append(measure(workers, seconds)._asdict())
    return rates


class Decoding:
    """Decode and resize alone: `hubbeam.modules.images.decode`, from memory into arrays.

    Args:
      photos: image files; a quarter of a gigabyte of them at most is taken.
      size: height and width of the module's input.
      preset: name of the preset.
    """

    def __init__(self, photos: Sequence[Path], size: tuple[int, int], preset: str):
        self._preset = load_preset(preset)
        self._size = size
        self._files: list[bytes] = []
        # Spread over the whole set, and shared out in turn: every thread gets the same mix.
        step = max(1, len(photos) // 512)
        total = 0
        for path in photos[::step]:
            data = path.read_bytes()
            total += len(data)
            if self._files and total > _MOST_BYTES:
                break
            self._files.append(data)

    def workers(self, setting: Setting) -> list[Batch]:
        """Makes ``setting["threads"]`` workers that take the files in turn."""
        files = itertools.cycle(self._files)
        lock = threading.Lock()

        def worker() -> Batch:
            # As small as an engine's batch, so that the arrays stay in the cache as they would.
            outs = np.empty((4, *self._size, 3), self._preset.dtype)

            def batch() -> int:
                for out in outs:
                    with lock:
                        data = next(files)
                    decode(data, self._preset, [out])
                return len(outs)

            return batch

        return [worker() for _ in range(setting["threads"])]

    def search(self, seconds: float = _SEARCH_SECONDS) -> list[tuple[float, Setting]]:
        """Tries numbers of threads."""
        counts = sorted({cores(), cores() + 1, 2 * cores()})
        return search([{"threads": n} for n in counts], self.workers, seconds)


def pixels_of(photos: Sequence[Path], size: tuple[int, int], preset: str, count: int) -> np.ndarray:
    """Decodes photographs for an engine.

    Returns:
      [count, height, width, 3] of the preset's type.
    """
    chosen = load_preset(preset)
    pixels = np.empty((count, *size, 3), chosen.dtype)
    for out, path in zip(pixels, itertools.cycle(photos), strict=False):
        decode(path.read_bytes(), chosen, [out])
    return pixels


FAMILIES = ("openvino", "tensorflow", "tensorflow-wide", "hubbeam")
"""Ways to run a module that are searched, one process each; see `family`."""


class Family:
    """One way to run a module, with settings of its own."""

    def __init__(self, pixels: np.ndarray):
        self._pixels = pixels

    def settings(self) -> list[Setting]:
        """Returns what is worth a try."""
        raise NotImplementedError

    def caller(self, setting: Setting) -> Callable[[], Callable[[np.ndarray], Any]]:
        """Compiles the module for a setting.

        Returns:
          Gives each thread a function of its own that runs one batch of ``setting["batch"]``.
        """
        raise NotImplementedError

    def workers(self, setting: Setting) -> list[Batch]:
        """Makes ``setting["callers"]`` workers that run batches of photographs in turn."""
        size = setting["batch"]
        count = len(self._pixels) // size
        batches = [self._pixels[i * size : (i + 1) * size] for i in range(count)]
        caller = self.caller(setting)

        def worker(first: int) -> Batch:
            run, turn = caller(), itertools.cycle(batches[first:] + batches[:first])

            def batch() -> int:
                run(next(turn))
                return size

            return batch

        callers = setting["callers"]
        return [worker(i * count // callers) for i in range(callers)]

    def search(self, seconds: float = _SEARCH_SECONDS) -> list[tuple[float, Setting]]:
        """Measures all settings, the fastest first."""
        found = search(self.settings(), self.workers, seconds)
        # The next batch may wait at the stream, so that no stream waits for its caller.
        again = [{**setting, "callers": 2 * setting["callers"]} for _, setting in found[:2]]
        more = search([*(s for _, s in found[:2]), *again], self.workers, seconds)
        best = more + found[2:]
        return sorted(best, key=lambda pair: -pair[0])


class _OpenVINO(Family):
    """OpenVINO in float32, bytes in; static or dynamic batches; streams of one or more threads."""

    def __init__(self, pixels: np.ndarray, folder: Path, module: ResolvedModule, cache: Path):
        super().__init__(pixels)
        self._ov = import_openvino()
        self._size = module.image_size
        version = self._ov.__version__.split("-")[0]
        kind = f"openvino-{version}-{CONVERSION}"
        kept = cache / f"{module.sha256[:16]}-{module.signature}-{kind}.zip"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            no_reference = np.empty((0, module.width), np.float32)
            with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
                file.write(convert(folder, module, no_reference).pack())
            Path(file.name).replace(kept)
        converted = Converted.unpack(kept.read_bytes())
        self._model = self._ov.Core().read_model(converted.xml, converted.weights)

    def settings(self) -> list[Setting]:
        n = cores()
        streams = {(n, n), (1, n), (max(1, n // 2), n)}
        shapes = [(True, b) for b in (1, 2, 4, 8, 16, 32)] + [(False, b) for b in (4, 8, 32)]
        return [
            {"static": static, "batch": batch, "streams": s, "threads": t, "callers": s}
            for s, t in sorted(streams)
            for static, batch in shapes
        ]

    def caller(self, setting: Setting) -> Callable[[], Callable[[np.ndarray], Any]]:
        ov = self._ov
        model = self._model.clone()
        model.reshape([setting["batch"] if setting["static"] else -1, *self._size, 3])
        if self._pixels.dtype == np.uint8:
            model = take_bytes(model)
        options = {
            "INFERENCE_PRECISION_HINT": "f32",
            "EXECUTION_MODE_HINT": "ACCURACY",
            "NUM_STREAMS": str(setting["streams"]),
            "INFERENCE_NUM_THREADS": str(setting["threads"]),
            "ENABLE_HYPER_THREADING": True,
            "ENABLE_CPU_PINNING": False,
        }
        compiled = ov.Core().compile_model(model, "CPU", options)

        def make() -> Callable[[np.ndarray], Any]:
            request = compiled.create_infer_request()

            def run(batch: np.ndarray) -> Any:
                request.set_input_tensor(ov.Tensor(batch, shared_memory=True))
                request.infer()
                return request.get_output_tensor().data

            return run

        return make


class _TensorFlow(Family):
    """The frozen graph in one session: many calls of one thread, or one call of many.

    How many threads an operation has is the whole process's: the two need a process each.
    """

    def __init__(self, pixels: np.ndarray, folder: Path, module: ResolvedModule, threads: int):
        super().__init__(pixels)
        from hubbeam.modules.engines.tensorflow import freeze, import_tensorflow

        tf = import_tensorflow()
        config = tf.compat.v1.ConfigProto(
            intra_op_parallelism_threads=threads,
            inter_op_parallelism_threads=-1 if threads == 1 else 1,
            device_count={"GPU": 0},
        )
        self._threads = threads
        # The pools are made for the first session, which `freeze` would otherwise open.
        tf.compat.v1.Session(config=config, graph=tf.Graph())
        frozen = freeze(folder, module)
        with tf.Graph().as_default() as graph:
            self._input = tf.compat.v1.placeholder(pixels.dtype, [None, *module.image_size, 3])
            images = tf.cast(self._input, tf.float32)
            if pixels.dtype == np.uint8:
                images /= 255.0
            [self._output] = tf.import_graph_def(
                frozen.graph_def, {frozen.input: images}, [frozen.output], name=""
            )
        self._session = tf.compat.v1.Session(graph=graph, config=config)

    def settings(self) -> list[Setting]:
        callers = 1 if self._threads > 1 else cores()
        return [
            {"batch": batch, "callers": callers, "threads": self._threads}
            for batch in (1, 4, 8, 32)
        ]

    def caller(self, setting: Setting) -> Callable[[], Callable[[np.ndarray], Any]]:
        def run(batch: np.ndarray) -> Any:
            return self._session.run(self._output, {self._input: batch})

        return lambda: run


class _Hubbeam(Family):
    """The engine of hubbeam's own choice, so that whatever it may be, the limit knows it."""

    def __init__(self, pixels: np.ndarray, store: Store, module: ResolvedModule):
        super().__init__(pixels)
        self._choice = choose_engine(store, module, threads=cores())
        self._engine = load_engine(store, module, self._choice, threads=cores())

    def settings(self) -> list[Setting]:
        return [
            {
                "engine": self._choice.engine,
                "batch": self._choice.batch_size,
                "callers": self._choice.streams,
            }
        ]

    def caller(self, setting: Setting) -> Callable[[], Callable[[np.ndarray], Any]]:
        return lambda: self._engine.run


def family(
    name: str, pixels: np.ndarray, store: Store, module: ResolvedModule, cache: Path
) -> Family:
    """Loads a module in one of `FAMILIES`.

    Raises:
      ConfigError: what it needs is not installed.
    """
    if name == "hubbeam":
        return _Hubbeam(pixels, store, module)
    folder = store.local_folder(module)
    if name == "openvino":
        return _OpenVINO(pixels, folder, module, cache)
    return _TensorFlow(pixels, folder, module, 1 if name == "tensorflow" else cores())


def compare_engines(
    store: Store, module: ResolvedModule, pixels: np.ndarray, turns: int, seconds: float
) -> dict[str, Any]:
    """Measures every engine that is installed on one module, in turns, in this process.

    Args:
      store: where the module is.
      module: the module.
      pixels: photographs.
      turns: how often each is measured.
      seconds: how long a turn is.

    Returns:
      For each engine its median images/s, its batch, and the worst cosine to TensorFlow over the
      photographs and over hubbeam's own pictures; what ``auto`` takes; why others are missing.
    """
    engines: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name in ENGINES:
        if name == "auto":
            continue
        try:
            choice = choose_engine(store, module, name, threads=cores())
            engines[name] = choice, load_engine(store, module, choice, threads=cores())
        except Exception as error:
            missing[name] = str(error)
    reference = engines["tensorflow"][1].run(pixels)
    pictures = check_pictures(module.image_size)
    checked = engines["tensorflow"][1].run(pictures)
    rates: dict[str, list[float]] = {name: [] for name in engines}
    workers = {}
    for name, (choice, engine) in engines.items():

        def batch(engine: Any = engine, size: int = choice.batch_size) -> int:
            engine.run(pixels[:size])
            return size

        workers[name] = [batch] * choice.streams
        batch()
    for _ in range(turns):
        for name in engines:
            rates[name].append(measure(workers[name], seconds).images_per_second)
    auto = choose_engine(store, module, threads=cores())
    return {
        "auto": auto.engine,
        "why": auto.why,
        "missing": missing,
        "engines": {
            name: {
                "images_per_second": statistics.median(rates[name]),
                "turns": rates[name],
                "batch_size": choice.batch_size,
                "precision": choice.precision,
                "cosine_min": agreement(engine.run(pictures), checked),
                "cosine_min_photos": agreement(engine.run(pixels), reference),
            }
            for name, (choice, engine) in engines.items()
        },
    }
