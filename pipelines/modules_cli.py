"""The commands `hubbeam modules …`: what modules there are, get them, check them, build them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from hubbeam.modules import download
from hubbeam.modules.errors import ConfigError, RunError
from hubbeam.modules.inspect import end_points, inspect_module
from hubbeam.modules.spec import ModuleInfo, ModuleSpec, load_spec, spec_names
from hubbeam.modules.store import DamagedError, Store, Stored, hash_files, tree_sha256

app = typer.Typer(help="List, fetch, check, build and convert modules.", no_args_is_help=True)

StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="Folder or gs:// path of modules. [$HUBBEAM_STORE, user cache]"),
]


class Format(str, Enum):
    """Formats of modules that `build` writes."""

    hub1 = "hub1"
    tf2 = "tf2"


@app.callback()
def _quiet_tensorflow() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@app.command("list")
def list_modules(store: StoreOption = None) -> None:
    """List the modules that hubbeam describes, and what else is in the store."""
    where = Store(store)
    table = _table("module", "input", "width", "fine-tuning", "in the store", "description")
    known = set()
    for spec in map(load_spec, spec_names()):
        known |= {spec.handle, *spec.mirrors}
        table.add_row(
            spec.name,
            f"{spec.image_size}x{spec.image_size}",
            str(spec.width),
            _yes(spec.fine_tunable),
            _state(where, spec.name),
            escape(spec.description),
        )
    for handle in where.handles():
        if handle not in known:
            stored = _find(where, handle)
            info = stored.entry.info if stored else None
            size = "x".join(map(str, info.image_size)) if info and info.image_size else "?"
            tunable = _yes(info.fine_tunable) if info else "?"
            table.add_row(escape(handle), size, "", tunable, _state(where, handle), "")
    _console().print(table)
    _console().print(f"Store: {escape(where.root)}", highlight=False)


@app.command()
def show(
    module: Annotated[str, typer.Argument(help="Name, YAML file, folder, or stored handle.")],
    store: StoreOption = None,
) -> None:
    """Show what a module is: description, format, signatures, end points, size, sha256."""
    out = _console()
    where = Store(store)
    facts: dict[str, str] = {}
    spec = _spec(module)
    if spec:
        facts |= _describe(spec)
    folder = Path(module).expanduser()
    if not spec and folder.is_dir():
        info = inspect_module(folder)
        facts["folder"] = str(folder.resolve())
        sha256 = tree_sha256(hash_files(folder))
    else:
        stored = where.find(module) if spec else where.get(module)
        if stored is None:
            _print_facts(out, facts | {"in the store": f"no ({where.root})"})
            return
        info, sha256 = stored.entry.info, stored.entry.sha256
        facts |= {
            "handle": stored.handle,
            "in the store": stored.place,
            "fetched from": stored.entry.source,
            "fetched at": f"{stored.entry.fetched_at:%Y-%m-%d %H:%M} UTC",
        }
    _print_facts(out, facts | _inspected(info) | {"sha256": sha256})
    table = _table("signature", "in/out", "key", "tensor")
    inner = end_points(info)
    for name, signature in info.signatures.items():
        rows = [("in", k, t) for k, t in signature.inputs.items()]
        rows += [("out", k, t) for k, t in signature.outputs.items() if k not in inner]
        for kind, key, tensor in rows:
            table.add_row(escape(name), kind, escape(key), escape(str(tensor)))
    out.print(table)
    if inner:
        table = _table("end point", "tensor")
        for key, tensor in inner.items():
            table.add_row(escape(key), escape(str(tensor)))
        out.print(table)


@app.command()
def fetch(
    modules: Annotated[list[str], typer.Argument(help="Names, YAML files or handles.")],
    store: StoreOption = None,
    source: Annotated[
        str | None,
        typer.Option("--from", help="Take the one module from this folder or archive instead."),
    ] = None,
) -> None:
    """Get modules into the store. One that is there already is checked, and kept."""
    where = Store(store)
    out = _console()
    if source is not None:
        if len(modules) != 1:
            raise ConfigError("--from is for one module at a time")
        resolved = where.add(Path(source).expanduser(), modules[0])
        out.print(f"{escape(modules[0])}: stored, {escape(resolved.entry)}", soft_wrap=True)
        return
    for module in modules:
        with download_progress() as progress:
            resolved, fetched = where.fetch(module, progress=progress)
        done = "fetched" if fetched else "already there, unharmed"
        out.print(f"{escape(module)}: {done}, {escape(resolved.entry)}", soft_wrap=True)


@app.command()
def verify(
    module: Annotated[str, typer.Argument(help="Name or handle of a stored module, or a folder.")],
    against: Annotated[
        str | None,
        typer.Option(help=".npz with images (uint8) and features, logits or end points."),
    ] = None,
    store: StoreOption = None,
) -> None:
    """Check a module's files, load it, run it, and compare it with expected values."""
    out = _console()
    folder = Path(module).expanduser()
    if folder.is_dir() and not _spec(module):
        files = hash_files(folder)
        out.print(f"files: {len(files)}, sha256 {tree_sha256(files)}", highlight=False)
    else:
        where = Store(store)
        stored = where.verify(module)
        folder = where.local_folder(where.resolve(module, offline=True))
        out.print(
            f"files: {len(stored.entry.files)}, all as recorded, sha256 {stored.entry.sha256}",
            highlight=False,
        )
    from hubbeam.modules import verify as checks
    from hubbeam.modules.engines.base import COSINE_MIN, check_pictures
    from hubbeam.modules.inspect import choose

    info = inspect_module(folder)
    choice = choose(info, None, module)
    vectors = checks.run_module(folder, info, check_pictures(choice.image_size))[choice.output]
    import numpy as np

    if not np.isfinite(vectors).all():
        raise RunError(f"module {module}: its vectors are not finite")
    out.print(f"runs: {len(vectors)} pictures, {vectors.shape[1]} values each", highlight=False)
    if against is None:
        return
    table = _table("output", "smallest cosine", "largest difference")
    compared = checks.compare_module(folder, against)
    for output, cosine, difference in compared:
        table.add_row(escape(output), f"{cosine:.7f}", f"{difference:.2e}")
    out.print(table)
    if bad := [c.output for c in compared if c.cosine < COSINE_MIN]:
        raise RunError(
            f"module {module} differs from {against}: {', '.join(bad)} (cosine below {COSINE_MIN})"
        )


@app.command()
def build(
    module: Annotated[str, typer.Argument(help="Name or YAML file.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to make.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(help="TF-Slim checkpoint: prefix or archive. [the one the module came from]"),
    ] = None,
    format: Annotated[Format, typer.Option(help="TF1 Hub format, or TF2 SavedModel.")] = (
        Format.hub1
    ),
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Random values instead of a checkpoint.")
    ] = False,
) -> None:
    """Build a module from its TF-Slim checkpoint."""
    spec = load_spec(module)
    _check_writable(Path(output))
    from hubbeam.modules.engines.tensorflow import import_tensorflow

    import_tensorflow()  # without its notices, before `build` imports it
    from hubbeam.modules.build import build_module

    with download_progress() as progress:
        folder = build_module(
            spec,
            output,
            checkpoint=checkpoint,
            format=format.value,
            untrained=untrained,
            progress=progress,
        )
    kind = "untrained " if untrained else ""
    _console().print(
        f"{kind}module {spec.name} built in {escape(str(folder))}; "
        f"`hubbeam modules fetch {escape(module)} --from {escape(str(folder))}` stores it",
        soft_wrap=True,
        highlight=False,
    )


@app.command("to-tflite")
def to_tflite(
    module: Annotated[str, typer.Argument(help="Name, handle or folder.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The .tflite file to write.")],
    uint8: Annotated[
        bool, typer.Option("--uint8", help="Integer arithmetic, uint8 input and output.")
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(help="Pictures (quoted glob) that give the ranges, if the module has none."),
    ] = None,
    signature: Annotated[
        str | None, typer.Option(help="Signature. [image_feature_vector or default]")
    ] = None,
    store: StoreOption = None,
) -> None:
    """Convert a module to TensorFlow Lite."""
    if Path(output).is_dir():
        raise ConfigError(f"--output {output} is a folder: name a file")
    _check_writable(Path(output))
    folder = Path(module).expanduser()
    if not folder.is_dir() or _spec(module):
        where = Store(store)
        with download_progress() as progress:
            folder = where.local_folder(where.resolve(module, progress=progress))
    from hubbeam.modules import tflite

    model = tflite.to_tflite(
        folder, output, signature=signature, uint8=uint8, calibration=calibration
    )
    _console().print(
        f"{escape(output)}: {model.size_bytes} bytes, {len(model.operators)} operators"
        + (", all integer" if model.integer else ""),
        soft_wrap=True,
        highlight=False,
    )


def _check_writable(output: Path) -> None:
    """Refuses a place that cannot be written, before the work is done."""
    place = output.absolute().parent
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"--output {output} cannot be written: see {place}")


@contextmanager
def download_progress() -> Iterator[download.Progress]:
    """Shows downloads on the error output: a bar on a terminal, else a line for each."""
    console = Console(stderr=True)
    if not console.is_terminal:
        seen: set[str] = set()

        def tell(url: str, done: int, total: int | None) -> None:
            if url not in seen:
                seen.add(url)
                size = f" ({total / 1e6:.1f} MB)" if total else ""
                console.print(f"fetching {escape(url)}{size}", soft_wrap=True, highlight=False)

        yield tell
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def draw(url: str, done: int, total: int | None) -> None:
            if url not in tasks:
                tasks[url] = bars.add_task(escape(url.split("?")[0]), total=total)
            bars.update(tasks[url], completed=done, total=total)

        yield draw


def _console() -> Console:
    # What is piped is not cut or wrapped at a terminal's width.
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=240)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print_facts(out: Console, facts: dict[str, str]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        table.add_row(key, escape(value))
    out.print(table)


def _spec(module: str) -> ModuleSpec | None:
    known = module in spec_names() or module.endswith((".yaml", ".yml"))
    return load_spec(module) if known else None


def _describe(spec: ModuleSpec) -> dict[str, str]:
    low, high = spec.colour_range
    facts = {
        "name": spec.name,
        "description": spec.description,
        "handle": spec.handle,
        "mirrors": "\n".join(spec.mirrors),
        "input": f"{spec.image_size}x{spec.image_size}, {spec.dtype} in [{low:g}, {high:g}]",
        "vector": f"{spec.width} values, signature {spec.signature}",
        "classes": str(spec.classes or ""),
        "sibling": spec.sibling or "",
        "checkpoint": spec.checkpoint.url if spec.checkpoint else "",
        "licence": spec.licence,
        "source": spec.source,
    }
    return {key: value for key, value in facts.items() if value}


def _inspected(info: ModuleInfo) -> dict[str, str]:
    kinds = {"hub1": "TF1 Hub format", "tf2": "TF2 SavedModel"}
    facts = {
        "format": kinds[info.format],
        "tag sets": ", ".join("{" + ", ".join(tags) + "}" for tags in info.tag_sets),
        "image size": "x".join(map(str, info.image_size)) if info.image_size else "unknown",
        "end points": str(len(end_points(info))),
        "parameters": "unknown" if info.parameters is None else f"{info.parameters:,}",
        "variables": "unknown" if info.variables is None else str(info.variables),
        "size": f"{info.size_bytes / 1e6:.1f} MB",
        "fine-tuning": _yes(info.fine_tunable),
    }
    if info.notes.get("untrained"):
        facts["untrained"] = "YES: random values, its vectors mean nothing"
    return facts


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _find(store: Store, module: str) -> Stored | None:
    try:
        return store.find(module)
    except DamagedError:
        return None


def _state(store: Store, module: str) -> str:
    try:
        stored = store.find(module)
    except DamagedError:
        return "DAMAGED"
    if stored is None:
        return "no"
    return "yes, UNTRAINED" if stored.entry.info.notes.get("untrained") else "yes"
