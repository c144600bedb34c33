"""What the user sees of a run: progress while it works, a few lines at its end."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from hubbeam.pipelines.extract import DryRun
from hubbeam.transforms.job import ExtractJob
from hubbeam.transforms.progress import read_progress
from hubbeam.transforms.publish import RunReport

PLAIN_LINE_SECONDS = 30.0


@contextmanager
def progress_bar(job: ExtractJob, folder: str, console: Console) -> Iterator[None]:
    """Shows images done, images/s, time left and rejects while the body runs.

    On a terminal a bar; elsewhere a plain line every 30 seconds.
    """
    stop = threading.Event()
    show = _bar if console.is_terminal else _lines
    thread = threading.Thread(target=show, args=(job, folder, console, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _bar(job: ExtractJob, folder: str, console: Console, stop: threading.Event) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rejects]} rejects"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("images", total=job.planned.images, rate="", rejects=0)
        while True:
            last = stop.wait(0.25)
            done = read_progress(folder)
            speed = progress.tasks[0].speed
            progress.update(
                task,
                completed=done.images,
                rejects=done.rejects,
                rate=f"{speed:.0f}/s" if speed else "",
            )
            if last:
                return


def _lines(job: ExtractJob, folder: str, console: Console, stop: threading.Event) -> None:
    started = time.monotonic()
    while not stop.wait(PLAIN_LINE_SECONDS):
        done = read_progress(folder)
        rate = done.images / (time.monotonic() - started)
        left = (job.planned.images - done.images) / rate if rate else float("nan")
        console.print(
            f"{done.images} of {job.planned.images} images, {rate:.0f}/s, {left:.0f} s left, "
            f"{done.rejects} rejects",
            highlight=False,
        )


def summary(report: RunReport, output: str) -> str:
    """Returns five lines: how many, how fast, rejects by reason, datasets, where."""
    kept = f" ({report.images_kept} kept from an earlier run)" if report.images_kept else ""
    dropped = f", {report.duplicates} duplicate names dropped" if report.duplicates else ""
    reasons = ", ".join(f"{count} {reason}" for reason, count in report.rejects.items())
    where = ", ".join(
        f"{name} ({module['vectors']} x {module['width']})"
        for name, module in report.modules.items()
    )
    return "\n".join(
        [
            f"images    {report.listed}{kept}{dropped}",
            f"speed     {report.images_per_second:.1f} images/s over {report.seconds:.1f} s"
            if report.images_kept < report.listed
            else "speed     nothing had to be computed",
            f"rejects   {report.rejected_images}" + (f": {reasons}" if reasons else ""),
            f"vectors   {where}",
            f"output    {output}" + ("" if report.published else " (NOT published)"),
        ]
    )


def plan_text(result: DryRun, output: str) -> str:
    """Returns the plan of a dry run, a line a fact."""
    planned = result.planned
    meaning = planned.meaning
    lines = [
        f"images    {planned.images} ({planned.duplicates} duplicate names dropped)",
        f"bytes     {decimal(planned.size_bytes)}",
        f"shards    {planned.shards} of about {-(-planned.images // planned.shards)} images"
        + (", taken up from an unfinished run" if result.resumes else ""),
        f"preset    {meaning.preset.name}",
        f"format    {meaning.format}",
    ]
    for module, engine in zip(meaning.modules, result.engines, strict=True):
        height, width = module.image_size
        lines.append(
            f"module    {module.name}: {height}x{width} -> {module.width} ({module.signature}), "
            f"sha256 {module.sha256[:12]}, engine {engine.engine} ({engine.why})"
        )
    lines.append(f"output    {output} (dry run: nothing was computed or written)")
    return "\n".join(lines)
