"""One measurement in a process of its own: `bench.py` starts this file with a task as JSON.

    python child.py TASK RESULT

What is imported, loaded and held in memory is so only what the measured thing needs.
"""

import functools
import json
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Python started with -P, or under PYTHONSAFEPATH, does not look beside the script.
sys.path.insert(0, str(Path(__file__).resolve().parent))

Result = dict[str, Any]


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_bytes() -> int:
    """Peak of the resident memory of this process."""
    # Linux's ru_maxrss begins with the peak of the process that started this one.
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def plain(task: Result) -> Result:
    """Runs the plain Beam job."""
    import plain_beam

    stamps: Result = {}
    original = plain_beam.HubModuleHandler.run_inference

    @functools.wraps(original)
    def run_inference(*args: Any, **kwargs: Any) -> Any:
        vectors = original(*args, **kwargs)
        stamps.setdefault("first_vector", time.time())
        return vectors

    plain_beam.HubModuleHandler.run_inference = run_inference
    stamps["pipeline_begin"], used = time.time(), cpu_seconds()
    plain_beam.run(
        f"{task['folder']}/*",
        task["module_folder"],
        f"{task['output']}/vectors",
        task["size"],
        task.get("beam", ()),
    )
    stamps["pipeline_end"] = time.time()
    return {**stamps, "pipeline_cpu": cpu_seconds() - used, "peak_bytes": peak_bytes()}


def ours(task: Result) -> Result:
    """Runs hubbeam's job."""
    from hubbeam.pipelines.extract import run_extract
    from hubbeam.pipelines.options import load_options

    stamps: Result = {}

    @contextmanager
    def watch(job: Any, progress: str) -> Iterator[None]:
        ended = threading.Event()

        def wait_for_vectors() -> None:
            while not ended.wait(0.01):
                if any(Path(progress).glob("*.json")):
                    stamps["first_vector"] = time.time()
                    return

        stamps["pipeline_begin"], stamps["used"] = time.time(), cpu_seconds()
        thread = threading.Thread(target=wait_for_vectors)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    options = load_options(
        None,
        {
            "inputs": (task["folder"],),
            "modules": tuple(task["modules"]),
            "output": task["output"],
            "store": task["store"],
            **task.get("options", {}),
        },
    )
    report = run_extract(options, [], watch)
    stamps["pipeline_end"] = time.time()
    used = stamps.pop("used")
    if report.rejected_images:
        raise RuntimeError(f"{report.rejected_images} images were rejected: {report.rejects}")
    return {
        **stamps,
        "pipeline_cpu": cpu_seconds() - used,
        "peak_bytes": peak_bytes(),
        "engines": {name: module["engine"] for name, module in report.modules.items()},
        "shards": report.shards,
    }


def prepare(task: Result) -> Result:
    """Puts modules in the store, builds untrained stand-ins, and chooses engines."""
    from hubbeam.modules.engines import choose_engine
    from hubbeam.modules.spec import load_spec
    from hubbeam.modules.store import Store

    store = Store(task["store"])
    found: Result = {}
    for name, folder in task["modules"].items():
        untrained = folder is None
        if untrained:
            from hubbeam.modules.build import build_module

            folder = f"{task['built']}/{name}"
            if not Path(folder).exists():
                build_module(load_spec(name), folder, untrained=True)
        module = store.add(folder, name)
        choices = [choose_engine(store, module, threads=n) for n in task["threads"][name]]
        found[name] = {
            "module": module.model_dump(mode="json"),
            "folder": str(store.local_folder(module)),
            "untrained": untrained,
            "engine": choices[0].model_dump(mode="json"),
        }
    return found


def _photos(task: Result) -> list[Path]:
    return sorted(Path(task["photos"]).iterdir())


def decoding(task: Result) -> Result:
    """Searches (no ``settings`` in the task) or measures decode and resize alone."""
    import limit

    part = limit.Decoding(_photos(task), tuple(task["size"]), task["preset"])
    if "settings" not in task:
        return {"ranked": part.search(task["seconds"])}
    return {"rates": limit.measure_all(part.workers, task["settings"], task["seconds"])}


def engine(task: Result) -> Result:
    """Searches (no ``settings`` in the task) or measures one family of engines alone."""
    import limit

    from hubbeam.modules.errors import ConfigError
    from hubbeam.modules.spec import ResolvedModule
    from hubbeam.modules.store import Store

    module = ResolvedModule.model_validate(task["module"])
    pixels = limit.pixels_of(_photos(task), module.image_size, task["preset"], 96)
    try:
        family = limit.family(
            task["family"], pixels, Store(task["store"]), module, Path(task["converted"])
        )
    except ConfigError as error:
        return {"missing": str(error)}
    if "settings" not in task:
        return {"ranked": family.search(task["seconds"])}
    return {"rates": limit.measure_all(family.workers, task["settings"], task["seconds"])}


def engines(task: Result) -> Result:
    """Compares all engines on one module."""
    import limit

    from hubbeam.modules.spec import ResolvedModule
    from hubbeam.modules.store import Store

    module = ResolvedModule.model_validate(task["module"])
    pixels = limit.pixels_of(_photos(task), module.image_size, task["preset"], 64)
    store = Store(task["store"])
    return limit.compare_engines(store, module, pixels, task["turns"], task["seconds"])


TASKS = {f.__name__: f for f in (plain, ours, prepare, decoding, engine, engines)}


def main() -> None:
    task = json.loads(sys.argv[1])
    result = TASKS[task["task"]](task)
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
