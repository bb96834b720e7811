"""The command line: parse, call one function of the api, print, exit code.

Heavy modules are imported inside the commands, so that `--help` starts at once.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import sys
import threading
import traceback
from contextlib import suppress
from typing import Annotated, Any

import typer

from tilenet import __version__, cli_evaluate, cli_mask, cli_predict, cli_train
from tilenet.cli_options import Debug, Json
from tilenet.console import complain as _complain
from tilenet.console import show as _print
from tilenet.errors import DISK_FULL, InterruptError, ResourceError, TilenetError, UsageError
from tilenet.memory import return_large_arrays
from tilenet.stops import stopping_on_signals
from tilenet.strangers import is_url
from tilenet.watchdog import watch_reads

__all__ = ["app", "run"]

_TAKING_URLS = {"predict", "verify", "info"}
_LOCAL = {
    "--into", "--manifest", "--like", "--aoi", "--dask-report", "--scratch", "--csv", "--summary",
    "--config",
}  # fmt: skip
_OF_THEIR_OWN = {"--model", "-m", "--scheduler"}
"""Options that read a URL in a way of their own."""

app = typer.Typer(
    name="tilenet",
    help="Segment images of any size: overlapping tiles, U-Net inference, blended seams.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_ClickError: type[Any] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)
_PATIENCE = 5.0  # seconds for a last word


def _version(value: bool) -> None:
    if value:
        _print(f"tilenet {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


app.command()(cli_predict.predict)
app.command()(cli_train.train)
app.command()(cli_evaluate.evaluate)
app.command()(cli_mask.verify)
app.command()(cli_mask.export)


@app.command()
def info(
    path: Annotated[str, typer.Argument(help="A raster, a mask, or a model.")],
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Read s3://… and other URLs.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a raster, a mask or a model is."""
    del debug
    from tilenet.info import describe
    from tilenet.page import page

    found = describe(path, allow_remote=allow_remote)
    _print(found if as_json else page(str(path), found))


@app.command()
def models(as_json: Json = False, debug: Debug = False) -> None:
    """List the models that ship with tilenet."""
    del debug
    from tilenet.info import list_models

    found = list_models()
    if as_json:
        _print({"models": found})
    for model in [] if as_json else found:
        _print(f"{model['name']}: {model['description']} ({model['size_mb']} MB)")


@app.command()
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Check this machine: devices, backends, codecs, the batch contract."""
    del debug
    from tilenet.info import examine
    from tilenet.page import outline

    found = examine()
    _print(found if as_json else outline(found))
    if not found["ok"]:
        raise typer.Exit(4)


def _fail(error: TilenetError | InterruptError, arguments: list[str]) -> int:
    if "--debug" in arguments:
        traceback.print_exc()
    if "--json" in arguments:
        with suppress(ResourceError):  # it may be stdout itself that failed
            _print({"error": error.as_dict()})
    _complain(str(error))
    return error.code


def _end(error: TilenetError, arguments: list[str]) -> None:
    """Say why and end the process, whatever its threads are stuck in."""
    for onlooker in cli_predict.onlookers:
        # The record may lie on the disk that does not answer.
        thread = threading.Thread(target=onlooker.end, args=(error.code, error), daemon=True)
        thread.start()
        thread.join(_PATIENCE)
    os._exit(_fail(error, arguments))  # what it says is flushed


def _unforeseen(error: Exception) -> TilenetError:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # --help, for one
        return ResourceError(DISK_FULL, error.filename or "", "make room")
    what = f"{type(error).__name__}: {error}"
    return TilenetError(f"a defect in tilenet: {what}", "", "--debug shows where", code=1)


def _check_none_empty(arguments: list[str]) -> None:
    """Raise UsageError where nothing is given, as by a script's variable that is not set.

    As a path it would stand for the current folder, and all that is in it.
    """
    for before, argument in itertools.pairwise(["", *arguments]):
        if not argument.strip() or (argument.startswith("--") and argument.endswith("=")):
            place = argument.strip() or before or "tilenet"
            raise UsageError("an empty argument", f"after {place}", "give a value, or leave it out")


def _check_urls(arguments: list[str]) -> None:
    """Raise UsageError for a URL where only a path will do: it would become a folder ``s3:``."""
    command = arguments[0] if arguments else ""
    for before, argument in itertools.pairwise(["", *arguments]):
        option, _, value = argument.partition("=") if argument.startswith("-") else (before, "", "")
        if not is_url(value or argument) or option in _OF_THEIR_OWN:
            continue
        if command not in _TAKING_URLS or option in _LOCAL:
            where = option if option.startswith("-") else command
            raise UsageError(f"{where} takes no URL", value or argument, "give a path")


def run(arguments: list[str]) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : list of str
        Without the program's name.

    Returns
    -------
    int
        The exit code.
    """
    cli_predict.arguments[:] = arguments
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("tilenet: %(message)s"))
    logger = logging.getLogger("tilenet")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # Where a run ends in the middle of reading, it would list what zarr had under way.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    return_large_arrays()
    watch_reads(lambda error: _end(error, arguments))
    try:
        with stopping_on_signals():
            _check_none_empty(arguments)
            _check_urls(arguments)
            return int(app(arguments or ["--help"], standalone_mode=False) or 0)
    except (TilenetError, InterruptError) as error:
        return _fail(error, arguments)
    except _ClickError as error:
        where = f"tilenet {arguments[0]}" if arguments else "tilenet"
        return _fail(TilenetError(error.format_message(), where, "see --help", code=2), arguments)
    except typer.Exit as done:
        return int(done.exit_code)
    except typer.Abort:
        return 130
    except Exception as error:  # the last resort: one line, whatever it is
        return _fail(_unforeseen(error), arguments)
    finally:
        logger.removeHandler(handler)
