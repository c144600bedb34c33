"""The command `hubbeam`.

Exit codes: 0 done; 1 the run failed; 2 bad usage or configuration, found before anything ran;
3 more images were rejected than --max-reject-fraction allows, so nothing was published.
"""

import functools
import logging
import os
import sys
from contextlib import nullcontext
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console

from hubbeam.modules.errors import ConfigError, HubbeamError, RunError
from hubbeam.pipelines import modules_cli
from hubbeam.pipelines.options import ExtractOptions, load_options

OK, FAILED, USAGE, TOO_MANY_REJECTS = 0, 1, 2, 3

app = typer.Typer(
    help="TF-Hub image modules run over any number of images with Apache Beam.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # else defaults in [brackets] are taken for markup
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(modules_cli.app, name="modules")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"hubbeam {version('hubbeam')}")
        raise typer.Exit


@app.callback()
def _main(
    print_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def extract(
    context: typer.Context,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(help="Files, folders and globs (quote them; ** goes into folders)."),
    ] = None,
    config: Annotated[str | None, typer.Option(help="YAML job file; flags override it.")] = None,
    table: Annotated[
        str | None, typer.Option(help="Parquet, CSV or text file that names the images.")
    ] = None,
    uri_column: Annotated[
        str | None, typer.Option(help="Column of --table with the uris. [uri]")
    ] = None,
    module: Annotated[
        list[str] | None,
        typer.Option("--module", "-m", help="Name, YAML file or handle; may be repeated."),
    ] = None,
    signature: Annotated[
        str | None, typer.Option(help="Signature of the modules. [image_feature_vector or default]")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder of the datasets.")
    ] = None,
    format: Annotated[str | None, typer.Option(help="parquet or tfrecord. [parquet]")] = None,
    compression: Annotated[
        str | None, typer.Option(help="none or gzip, for tfrecord. [none]")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="photo, hub, slim_eval or a YAML file. [photo]")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="auto, or what must run the graph (tensorflow, openvino). [auto]"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Most images given to a module at once. [32]")
    ] = None,
    images_per_shard: Annotated[
        int | None, typer.Option(help="Images in a shard, about. [8192]")
    ] = None,
    shards: Annotated[int | None, typer.Option(help="Shards of each dataset.")] = None,
    max_bytes: Annotated[
        str | None, typer.Option(help="Larger files are rejected. [100MiB]")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(help="Larger pictures are rejected. [100000000]")
    ] = None,
    max_reject_fraction: Annotated[
        float | None, typer.Option(help="With more rejects nothing is published. [0.1]")
    ] = None,
    overwrite: Annotated[
        bool | None,
        typer.Option("--overwrite", help="Replace what the output holds, once the new is whole."),
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="Folder of resolved modules. [$HUBBEAM_STORE, user cache]")
    ] = None,
    runner: Annotated[
        str | None, typer.Option(help="local (Beam's in-memory runner), DataflowRunner, …. [local]")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Local worker processes, or most remote workers.")
    ] = None,
    project: Annotated[str | None, typer.Option(help="Google Cloud project.")] = None,
    region: Annotated[str | None, typer.Option(help="Google Cloud region.")] = None,
    temp_location: Annotated[
        str | None, typer.Option(help="Folder for Beam's temporary files.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and run nothing.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also print what TensorFlow and Beam log.")
    ] = False,
) -> None:
    """Turn image files into shards of feature vectors.

    What follows `--` goes to Beam untouched. Exit codes: 0 done; 1 the run failed; 2 bad usage or
    configuration; 3 too many images rejected, nothing published.
    """
    given = {**context.params, "modules": module}
    flags = {
        key: value
        for key in ExtractOptions.model_fields
        if (value := given.get(key)) not in (None, (), [])
    }
    options = load_options(config, flags)
    _calm(verbose, quiet)
    beam_args: list[str] = context.obj or []
    # Of its own: while worker processes run, what they write to stderr is kept out of sight.
    console = Console(file=os.fdopen(os.dup(2), "w"))

    # Beam takes seconds to import: what is wrong with the flags is said before.
    from hubbeam.pipelines import extract as job
    from hubbeam.pipelines import watch

    where = job.absolute(options.output)
    fetching = nullcontext if quiet else modules_cli.download_progress
    if dry_run:
        print(watch.plan_text(job.dry_run(options, beam_args, fetching), where))
        return
    show = None if quiet else functools.partial(watch.progress_bar, console=console)
    try:
        report = job.run_extract(options, beam_args, show, fetching)
    except KeyboardInterrupt:
        raise RunError("interrupted; the same command takes the run up again") from None
    if not quiet:
        print(watch.summary(report, where))
    if not report.published:
        message = (
            f"{report.rejected_images} of {report.listed} images were rejected, more than "
            f"--max-reject-fraction {options.max_reject_fraction} allows: see "
            f"{job.rejects_folder(where)}"
        )
        if report.rejected_fraction < 1:
            message += (
                "; the same command with --max-reject-fraction "
                f"{_round_up(report.rejected_fraction)} publishes what is there"
            )
        raise TooManyRejectsError(message)


class TooManyRejectsError(HubbeamError):
    """All is written and counted, but not published (exit code 3)."""


def _round_up(fraction: float) -> float:
    return -(-fraction * 1000 // 1) / 1000


def _calm(verbose: bool, quiet: bool) -> None:
    """Keeps the start-up noise of TensorFlow, Beam and gRPC out of sight, before their import."""
    if verbose:
        logging.basicConfig(level=logging.INFO)
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    logging.basicConfig(level=logging.CRITICAL, format="hubbeam: %(message)s")
    logging.getLogger("hubbeam").setLevel(logging.WARNING if quiet else logging.INFO)


def main() -> None:
    """Runs the command line; ends with one of the documented exit codes."""
    arguments, beam_args = sys.argv[1:], []
    if "--" in arguments:
        cut = arguments.index("--")
        arguments, beam_args = arguments[:cut], arguments[cut + 1 :]
    try:
        app(arguments, standalone_mode=True, obj=beam_args)
    except HubbeamError as error:
        print(f"hubbeam: {error}", file=sys.stderr)
        codes = {ConfigError: USAGE, TooManyRejectsError: TOO_MANY_REJECTS}
        sys.exit(next((code for kind, code in codes.items() if isinstance(error, kind)), FAILED))
    except OSError as error:
        print(f"hubbeam: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        sys.exit(FAILED)
