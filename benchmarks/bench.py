"""Speed, memory and cost: the plain Beam job, hubbeam, and what the machine can do.

    python benchmarks/bench.py --module MODULE_FOLDER [--quick] [--sections small,engines]

Every measurement is a process of its own. What is compared takes turns, round by round, and the
figures are medians over the rounds. See README.md.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from hubbeam.modules.engines.choose import cpu_name
from hubbeam.modules.spec import load_spec, spec_names
from hubbeam.modules.store import cache_folder
from hubbeam.transforms.process import cores, threads_for

HERE = Path(__file__).resolve().parent
# Python started with -P, or under PYTHONSAFEPATH, does not look beside the script.
sys.path.insert(0, str(HERE))

import photos  # noqa: E402
import report  # noqa: E402
from limit import FAMILIES  # noqa: E402

MAIN = "mobilenet_v2_050_224"
PRESET = "photo"

Result = dict[str, Any]


class Sizes(NamedTuple):
    """How much is measured.

    Attributes:
      rounds: turns of everything that is compared.
      small: images of 500x375 in a run.
      small_distinct: of those, different pictures; the others are further names of the same.
      large: images of 4000x3000 in a run.
      large_distinct: of those, different pictures.
      mix: images of the mixed collection in a run.
      mix_distinct: of those, different pictures.
      five: images of 500x375 in a run of five modules.
      five_large: images of 4000x3000 in a run of five modules.
      scale: images of the runs that show memory against size.
      tiny_distinct: different pictures of those.
      search_seconds: for each setting and turn of a search.
      part_seconds: for a measurement of decoding alone, or of an engine alone.
    """

    rounds: int
    small: int
    small_distinct: int
    large: int
    large_distinct: int
    mix: int
    mix_distinct: int
    five: int
    five_large: int
    scale: tuple[int, ...]
    tiny_distinct: int
    search_seconds: float
    part_seconds: float


FULL = Sizes(3, 10_000, 2000, 1440, 120, 1000, 400, 400, 120, (1000, 10_000), 1000, 0.3, 5.0)
QUICK = Sizes(1, 400, 100, 32, 8, 60, 20, 60, 8, (200, 1000), 100, 0.1, 1.0)


class Bench:
    """Starts measurements and keeps what they found.

    Args:
      sizes: how much is measured.
      cache: folder of photographs, modules and scratch files.
      modules: folder of each module, None for an untrained stand-in.
      price: of a vCPU-hour.
      wanted: names of the modules that will be needed.
    """

    def __init__(self, sizes: Sizes, cache: Path, modules: dict[str, str | None], price: float):
        self.sizes = sizes
        self.cache = cache
        self.price = price
        self.store = str(cache / "store")
        self.prepared = self.child(
            {
                "task": "prepare",
                "store": self.store,
                "built": str(cache / "built"),
                "modules": modules,
                # `processes` runs the main module with half of the threads as well.
                "threads": {
                    name: sorted({threads_for(1), threads_for(2 if name == MAIN else 1)})[::-1]
                    for name in modules
                },
            }
        )
        self._engines_searched: Result = {}

    def child(self, task: Result, *, sample: bool = False) -> Result:
        """Runs a task of child.py in a new process.

        Args:
          task: see there.
          sample: watch the memory of all processes that it starts, as a sum.

        Returns:
          Its result, and of the whole process: `seconds`, `cpu_seconds` (with its children), and
          where stamps are in the result, `begin`.
        """
        with tempfile.TemporaryDirectory(dir=self.scratch()) as folder:
            answer, errors = Path(folder, "result.json"), Path(folder, "stderr")
            command = [sys.executable, str(HERE / "child.py"), json.dumps(task), str(answer)]
            with errors.open("wb") as stderr:
                begin = time.time()
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=stderr,
                    stderr=stderr,
                    env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(HERE)},
                    start_new_session=True,
                )
                watched = _Session(process.pid) if sample else None
                try:
                    _, status, usage = os.wait4(process.pid, 0)
                except BaseException:
                    os.killpg(process.pid, signal.SIGTERM)  # a session of its own: no Ctrl-C there
                    raise
                process.returncode = os.waitstatus_to_exitcode(status)
                seconds = time.time() - begin
            if watched is not None:
                watched.stop()
            if process.returncode or not answer.exists():
                tail = "\n".join(errors.read_text(errors="replace").splitlines()[-15:])
                raise SystemExit(
                    f"bench: {task['task']} failed, exit code {process.returncode}\n{tail}"
                )
            result: Result = json.loads(answer.read_text())
        if task["task"] in ("plain", "ours"):
            used = usage.ru_utime + usage.ru_stime
            result |= {"begin": begin, "seconds": seconds, "cpu_seconds": used}
            if watched is not None and watched.peak_bytes:
                # Workers that are not waited for are missing in what wait4 tells.
                result["cpu_seconds"] = max(used, watched.cpu_seconds)
                result["peak_bytes"] = watched.peak_bytes
        return result

    def scratch(self) -> Path:
        """Folder for what a run leaves."""
        folder = self.cache / "scratch"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def photos(self, name: str, distinct: int) -> list[Path]:
        """Photographs of a set; makes what is missing."""
        report.say(f"photographs {name}: {distinct}")
        return photos.make_photos(name, distinct, self.cache)

    def folder(self, name: str, made: list[Path], count: int) -> str:
        """A folder with `count` images."""
        return str(photos.lay_out(made, count, self.cache / "inputs" / f"{name}-{count}"))

    def run(
        self, kind: str, folder: str, count: int, *, sample: bool = False, **task: Any
    ) -> Result:
        """Runs the plain job or ours and works out the figures of the run.

        Args:
          kind: ``plain`` or ``ours``.
          folder: the images.
          count: how many they are.
          sample: see `child`.
          task: more of the task.
        """
        output = Path(tempfile.mkdtemp(dir=self.scratch()))
        try:
            result = self.child(
                {
                    "task": kind,
                    "folder": folder,
                    "output": str(output / "out"),
                    "store": self.store,
                    "module_folder": self.prepared[MAIN]["folder"],
                    "size": load_spec(MAIN).image_size,
                    "modules": [MAIN],
                    **task,
                },
                sample=sample,
            )
        finally:
            shutil.rmtree(output)
        pipeline = result["pipeline_end"] - result["pipeline_begin"]
        first = result.get("first_vector")
        return {
            "images": count,
            "images_per_second": count / pipeline,
            "images_per_second_whole": count / result["seconds"],
            "pipeline_seconds": pipeline,
            "whole_seconds": result["seconds"],
            "first_vector_seconds": first and first - result["begin"],
            "first_vector_in_pipeline_seconds": first and first - result["pipeline_begin"],
            "cpu_seconds_per_1000": 1000 * result["pipeline_cpu"] / count,
            "cpu_seconds_per_1000_whole": 1000 * result["cpu_seconds"] / count,
            "peak_bytes": result["peak_bytes"],
            **({"engines": result["engines"]} if "engines" in result else {}),
        }

    def cost(self, images_per_second: float) -> float:
        """Price of a million images."""
        return self.price * cores() * 1e6 / images_per_second / 3600

    def engine_task(self, made: list[Path]) -> Result:
        """The task that measures the main module alone, at the best settings of a search."""
        task = {
            "task": "engine",
            "photos": str(made[0].parent),
            "preset": PRESET,
            "store": self.store,
            "module": self.prepared[MAIN]["module"],
            "converted": str(self.cache / "converted"),
        }
        if not self._engines_searched:
            for family in FAMILIES:
                report.say(f"searching the best setting: engine alone, {family}")
                found = self.child({**task, "family": family, "seconds": self.sizes.search_seconds})
                if "ranked" in found:
                    self._engines_searched[family] = found["ranked"]
        searched = self._engines_searched
        best = max(searched, key=lambda family: searched[family][0][0])
        return {**task, "family": best, "settings": _best(searched[best]), "searched": searched}

    def decoding_task(self, made: list[Path]) -> Result:
        """The task that measures decode and resize alone, at the best settings of a search."""
        task = {
            "task": "decoding",
            "photos": str(made[0].parent),
            "preset": PRESET,
            "size": self.prepared[MAIN]["module"]["image_size"],
        }
        report.say("searching the best setting: decode and resize alone")
        ranked = self.child({**task, "seconds": self.sizes.search_seconds})["ranked"]
        return {**task, "settings": _best(ranked), "searched": ranked}


def _best(ranked: list[Any]) -> list[Result]:
    """The settings that are measured again in every round, for a search is short."""
    return [setting for _, setting in ranked[:3]]


class _Session(threading.Thread):
    """Watches all processes of a session: the peak of their memory together, and CPU time.

    Memory is the proportional share (PSS), which counts a page that two have in common once.
    Linux only; elsewhere both stay 0.
    """

    def __init__(self, session: int):
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._session = session
        self._cpu: dict[int, float] = {}
        self._stopped = threading.Event()
        self.start()

    @property
    def cpu_seconds(self) -> float:
        return sum(self._cpu.values())

    def stop(self) -> None:
        self._stopped.set()
        self.join()

    def run(self) -> None:
        while not self._stopped.wait(0.25):
            total = 0
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    stat = (folder / "stat").read_text().rpartition(")")[2].split()
                    if int(stat[3]) != self._session:
                        continue
                    rollup = (folder / "smaps_rollup").read_text()
                except (OSError, IndexError):
                    continue
                ticks = os.sysconf("SC_CLK_TCK")
                self._cpu[int(folder.name)] = (int(stat[11]) + int(stat[12])) / ticks
                line = next(s for s in rollup.splitlines() if s.startswith("Pss:"))
                total += int(line.split()[1]) << 10
            self.peak_bytes = max(self.peak_bytes, total)


def in_turns(rounds: int, measurements: dict[str, Callable[[], Result]]) -> dict[str, list[Result]]:
    """Measures everything once a round, in the given order and backwards in turn.

    A virtual machine changes its pace within a minute: what stands side by side is compared best.
    """
    names = list(measurements)
    found: dict[str, list[Result]] = {name: [] for name in names}
    for number in range(rounds):
        for name in reversed(names) if number % 2 else names:
            report.say(f"round {number + 1} of {rounds}: {name}")
            found[name].append(measurements[name]())
    return found


def median(runs: list[Result]) -> Result:
    """Takes the median of every figure over the rounds."""
    return {
        key: statistics.median(run[key] for run in runs)
        for key, value in runs[0].items()
        if isinstance(value, (int, float)) and all(run.get(key) is not None for run in runs)
    }


def best_setting(settings: list[Result], rounds: list[list[Result]]) -> Result:
    """Finds the setting with the best median.

    Args:
      settings: what was measured in every round.
      rounds: for each round the rates of all settings.

    Returns:
      The setting, its median images/s, its rates by round, and the medians of the others.
    """
    medians = [
        statistics.median(rates[i]["images_per_second"] for rates in rounds)
        for i in range(len(settings))
    ]
    best = max(range(len(settings)), key=medians.__getitem__)
    return {
        "setting": settings[best],
        "images_per_second": medians[best],
        "rounds": [rates[best] for rates in rounds],
        "measured": list(zip(medians, settings, strict=True)),
    }


def against_plain(bench: Bench, name: str, count: int, distinct: int) -> Result:
    """Plain job, ours and the limit on one set of photographs."""
    made = bench.photos(name, distinct)
    folder = bench.folder(name, made, count)
    engine, decoding = bench.engine_task(made), bench.decoding_task(made)
    seconds = bench.sizes.part_seconds

    def part(task: Result) -> Result:
        return bench.child({**task, "searched": None, "seconds": seconds})

    runs = in_turns(
        bench.sizes.rounds,
        {
            "plain": lambda: bench.run("plain", folder, count),
            "decoding": lambda: part(decoding),
            "ours": lambda: bench.run("ours", folder, count),
            "engine": lambda: part(engine),
        },
    )
    parts = {
        name: best_setting(task["settings"], [run["rates"] for run in runs.pop(name)])
        for name, task in (("decoding", decoding), ("engine", engine))
    }
    runs["limit"] = [
        {
            "images_per_second": 1 / (1 / a["images_per_second"] + 1 / b["images_per_second"]),
            "cpu_seconds_per_1000": 1000 * (a["cpu_seconds"] + b["cpu_seconds"]),
        }
        for a, b in zip(parts["decoding"]["rounds"], parts["engine"]["rounds"], strict=True)
    ]
    rows: Result = {}
    for row in ("plain", "ours", "limit"):
        rows[row] = median(runs[row])
        for other in ("plain", "limit"):
            rows[row][f"ratio_to_{other}"] = statistics.median(
                mine["images_per_second"] / theirs["images_per_second"]
                for mine, theirs in zip(runs[row], runs[other], strict=True)
            )
        rows[row]["cost_per_million"] = bench.cost(rows[row]["images_per_second"])
    sizes = [path.stat().st_size for path in made]
    return {
        "photos": {
            "images": count,
            "distinct": distinct,
            "median_bytes": statistics.median(sizes),
        },
        "rows": rows,
        "decoding": parts["decoding"],
        "engine": {**parts["engine"], "family": engine["family"]},
        "searched": {"decoding": decoding["searched"], "engine": engine["searched"]},
        "runs": runs,
    }


def small(bench: Bench) -> Result:
    """Photographs of 500x375."""
    return against_plain(bench, "500x375", bench.sizes.small, bench.sizes.small_distinct)


def large(bench: Bench) -> Result:
    """Photographs of 4000x3000."""
    return against_plain(bench, "4000x3000", bench.sizes.large, bench.sizes.large_distinct)


def mix(bench: Bench) -> Result:
    """A collection as users have it."""
    return against_plain(bench, "mix", bench.sizes.mix, bench.sizes.mix_distinct)


def engines(bench: Bench) -> Result:
    """Every engine on each of the five modules."""
    made = bench.photos("500x375", min(64, bench.sizes.small_distinct))
    found: Result = {}
    for name, prepared in bench.prepared.items():
        report.say(f"engines: {name}")
        found[name] = bench.child(
            {
                "task": "engines",
                "photos": str(made[0].parent),
                "preset": PRESET,
                "store": bench.store,
                "module": prepared["module"],
                "turns": 2 * bench.sizes.rounds + 1,
                "seconds": bench.sizes.part_seconds / 4,
            }
        )
        found[name]["untrained"] = prepared["untrained"]
    return found


def five(bench: Bench) -> Result:
    """All modules in one run against a run for each, on photographs of both sizes."""
    sizes, names = bench.sizes, list(bench.prepared)
    sets = {
        "500x375": (sizes.five, sizes.small_distinct),
        "4000x3000": (sizes.five_large, sizes.large_distinct),
    }
    return {
        "modules": names,
        "sets": {
            name: _five_of(bench, names, name, count, distinct)
            for name, (count, distinct) in sets.items()
        },
    }


def _five_of(bench: Bench, names: list[str], photographs: str, count: int, distinct: int) -> Result:
    made = bench.photos(photographs, min(count, distinct))
    folder = bench.folder(photographs, made, count)

    def one_run() -> Result:
        return bench.run("ours", folder, count, modules=names)

    def run_each() -> Result:
        runs = [bench.run("ours", folder, count, modules=[name]) for name in names]
        return {key: sum(run[key] for run in runs) for key in ("pipeline_seconds", "whole_seconds")}

    runs = in_turns(min(2, bench.sizes.rounds), {"one run": one_run, "a run each": run_each})
    pairs = list(zip(runs["one run"], runs["a run each"], strict=True))
    return {
        "images": count,
        **{
            f"ratio_{key}": statistics.median(
                a[f"{key}_seconds"] / b[f"{key}_seconds"] for a, b in pairs
            )
            for key in ("pipeline", "whole")
        },
        "rows": {name: median(found) for name, found in runs.items()},
        "runs": runs,
    }


def scale(bench: Bench) -> Result:
    """Memory and rate against the number of images."""
    made = bench.photos("256x192", bench.sizes.tiny_distinct)
    rows: Result = {}
    for count in bench.sizes.scale:
        report.say(f"scale: {count} images")
        folder = bench.folder("256x192", made, count)
        rows[str(count)] = bench.run("ours", folder, count)
    return {"rows": rows}


def processes(bench: Bench) -> Result:
    """One worker process against two on this machine."""
    count = bench.sizes.small // 2
    made = bench.photos("500x375", bench.sizes.small_distinct)
    folder = bench.folder("500x375", made, count)
    two = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    runs = in_turns(
        bench.sizes.rounds,
        {
            "ours, one process": lambda: bench.run("ours", folder, count, sample=True),
            "ours, two processes": lambda: bench.run(
                "ours", folder, count, sample=True, options={"workers": 2}
            ),
            "plain, two processes": lambda: bench.run(
                "plain", folder, count, sample=True, beam=two
            ),
        },
    )
    return {"rows": {name: median(found) for name, found in runs.items()}, "runs": runs}


SECTIONS: dict[str, Callable[[Bench], Result]] = {
    f.__name__: f for f in (small, large, mix, engines, five, scale, processes)
}
QUICK_SECTIONS = ("small", "large", "mix", "scale", "processes")
_ALL_MODULES = {"engines", "five"}


def machine() -> Result:
    """What the figures were measured on."""
    packages = {}
    for name in ("hubbeam", "apache-beam", "tensorflow", "openvino", "ai-edge-litert", "numpy",
                 "pillow", "simplejpeg", "pyarrow"):  # fmt: skip
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "memory_bytes": memory,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
        "versions": packages,
    }


def _described(prepared: Result) -> Result:
    """What a result says of a module: nothing of where it lies."""
    kept = ("handle", "sha256", "format", "signature", "image_size", "width")
    return {
        **{key: prepared["module"][key] for key in kept},
        "untrained": prepared["untrained"],
        "engine": prepared["engine"],
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="[NAME=]FOLDER",
        help=f"folder of a module; without a name, of {MAIN}. What is not given is untrained",
    )
    parser.add_argument("--sections", help=f"some of {','.join(SECTIONS)}, with commas. [all]")
    parser.add_argument(
        "--quick", action="store_true", help="few images, one round: to try it, not to quote it"
    )
    parser.add_argument("--rounds", type=int, help="turns of everything that is compared")
    parser.add_argument("--scale", help="images of the runs of `scale`, with commas")
    parser.add_argument(
        "--cache", type=Path, default=cache_folder() / "bench", help="keeps photographs and modules"
    )
    parser.add_argument(
        "--price", type=float, default=0.056, help="of a vCPU-hour, in dollars. [0.056]"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder to write")
    arguments = parser.parse_args()
    chosen = arguments.sections.split(",") if arguments.sections else None
    if unknown := set(chosen or ()) - SECTIONS.keys():
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    arguments.sections = chosen or list(QUICK_SECTIONS if arguments.quick else SECTIONS)
    given = dict(
        module.split("=", 1) if "=" in module else (MAIN, module) for module in arguments.module
    )
    if unknown := given.keys() - set(spec_names()):
        parser.error(f"no such module: {', '.join(sorted(unknown))}")
    names = spec_names() if _ALL_MODULES & set(arguments.sections) else [MAIN]
    arguments.modules = {name: given.get(name) for name in sorted(names, key=lambda n: n != MAIN)}
    return arguments


def main() -> None:
    arguments = _arguments()
    sizes = QUICK if arguments.quick else FULL
    if arguments.rounds:
        sizes = sizes._replace(rounds=arguments.rounds)
    if arguments.scale:
        sizes = sizes._replace(scale=tuple(int(n) for n in arguments.scale.split(",")))
    found: Result = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "quick": arguments.quick,
        "price_per_vcpu_hour": arguments.price,
        "preset": PRESET,
        "photos_version": photos.VERSION,
        "sizes": sizes._asdict(),
        "sections": {},
    }
    report.say("preparing modules")
    cache = arguments.cache.expanduser().absolute()
    bench = Bench(sizes, cache, arguments.modules, arguments.price)
    found["modules"] = {name: _described(module) for name, module in bench.prepared.items()}
    begin = time.time()
    for name in arguments.sections:
        found["sections"][name] = SECTIONS[name](bench)
        found["seconds"] = time.time() - begin
        files = report.write(found, arguments.results)
    report.show(found)
    print("\n".join(str(file) for file in files))


if __name__ == "__main__":
    main()
