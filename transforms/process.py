"""What the shards of one process share: threads, engines, and the bytes that may be in memory."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

from hubbeam.modules.engines import import_engine, load_engine
from hubbeam.modules.engines.base import Engine, EngineChoice
from hubbeam.modules.spec import ResolvedModule
from hubbeam.modules.store import Store
from hubbeam.transforms.read import ByteBudget

READS_A_CORE = 32
"""Reads that may wait for the storage at once, for each core."""

READ_AHEAD_BYTES = 128 << 20
"""Bytes of image files that may be in memory at once."""


def cores() -> int:
    """Counts the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_for(processes: int) -> int:
    """Returns how many threads compute in each of `processes` on a machine (0: one a core)."""
    return max(1, cores() // processes) if processes else 1


DECODE_BYTES = 1 << 30
"""Bytes that pictures being decoded may take at once; a larger picture is decoded alone."""


class Process:
    """Shared by all shards that a process works on, however many the runner gives it at once.

    Attributes:
      threads: cores that this process computes on.
      compute: pool of as many threads, which decode and run modules. Measured on two cores: a third
        or fourth thread costs 4 %, for they push each other's pixels out of the cache.
      reads: reads that may wait for the storage at once.
      readers: pool of as many threads; what ends a shard's files waits there as well.
      reading: bytes of image files in memory.
      decoding: bytes that pictures being decoded may take.
    """

    def __init__(self, threads: int):
        self.threads = threads
        self.compute = ThreadPoolExecutor(threads, "hubbeam-compute")
        self.reads = READS_A_CORE * threads
        self.readers = ThreadPoolExecutor(self.reads, "hubbeam-read")
        self.reading = ByteBudget(READ_AHEAD_BYTES)
        self.decoding = ByteBudget(max(DECODE_BYTES, threads * DECODE_BYTES // 8))
        self._engines: dict[str, Future[Engine]] = {}
        self._loading = Lock()

    def load(
        self, module: ResolvedModule, choice: EngineChoice, store: str | None
    ) -> "Future[Engine]":
        """Begins to load the engine of a module, once in this process; another try after a failure.

        Returns:
          What `engine` waits for.
        """
        key = f"{module.sha256} {module.signature} {module.output} {choice.model_dump_json()}"
        with self._loading:
            loading = self._engines.get(key)
            if loading is None or (loading.done() and loading.exception()):
                # Beside a busy thread an import waits for Python's lock at every file it opens.
                import_engine(choice)
                loading = self.compute.submit(
                    load_engine, Store(store), module, choice, threads=self.threads
                )
                self._engines[key] = loading
            return loading

    def engine(self, module: ResolvedModule, choice: EngineChoice, store: str | None) -> Engine:
        """Returns the engine of a module, loaded once in this process.

        Raises:
          ConfigError: the store's entry is missing or damaged.
        """
        return self.load(module, choice, store).result()


_processes: dict[int, Process] = {}
_making = Lock()


def this_process(processes: int = 1) -> Process:
    """Returns what this process shares, made at the first call.

    Args:
      processes: worker processes on this machine, see `threads_for`.
    """
    threads = threads_for(processes)
    with _making:
        if threads not in _processes:
            _processes[threads] = Process(threads)
        return _processes[threads]
