"""The commands `verify` and `export`; `tilenet.cli` registers them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tilenet.cli_options import Debug, Json
from tilenet.console import complain, show

__all__ = ["export", "verify"]


def verify(
    mask: Annotated[str, typer.Argument(help="A mask that tilenet wrote.")],
    repair: Annotated[
        bool, typer.Option("--repair", help="Make what is damaged again, from raster and model.")
    ] = False,
    source: Annotated[
        Path | None, typer.Option("--input", help="The raster, if it was moved (not renamed).")
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="The model, if it was moved.")
    ] = None,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Read a mask at s3://….")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare every file of a mask with what its run wrote; name the blocks that differ."""
    del debug
    from tilenet import mask_api

    result = mask_api.verify(
        mask, repair=repair, source=source, model=model, allow_remote=allow_remote
    )
    failure = result.failure()
    if as_json:
        show(result.as_dict() | ({} if failure is None else {"error": failure.as_dict()}))
    elif failure is None:
        show(mask)
    if failure is not None:
        complain(str(failure))
        raise typer.Exit(failure.code)


def export(
    mask: Annotated[Path, typer.Argument(help="A mask that tilenet wrote.")],
    out: Annotated[Path, typer.Argument(help="x.tif (COG), x.ome.tif, x.png or x.zarr.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output of tilenet's.")
    ] = False,
    stac: Annotated[
        bool, typer.Option("--stac", help="Write a STAC item beside what is written.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a mask in another format: the bytes that predict would have written."""
    del debug
    from tilenet import mask_api

    written = mask_api.export(mask, out, overwrite=overwrite, stac=stac)
    show({"output": str(written)} if as_json else str(written))
