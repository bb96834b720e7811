"""The command `predict`; `tilenet.cli` registers it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tilenet.cli_options import Debug, Json
from tilenet.console import complain, show, tell
from tilenet.errors import InterruptError, TilenetError, UsageError
from tilenet.memory import not_collecting
from tilenet.quiet import asking_once, without_module

if TYPE_CHECKING:
    from tilenet.onlooker import Onlooker

__all__ = ["arguments", "onlookers", "predict"]

_MAX_LISTED = 20

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Bundled name, model folder, FILE.onnx or hf://org/name."),
]


arguments: list[str] = []
"""The command line, without the program's name."""

onlookers: list[Onlooker] = []
"""Who must be told when the process ends without more ado."""


@contextmanager
def _onlooking(progress: str, summary: Path | None) -> Iterator[Onlooker]:
    """Show what happens within, and how it ends."""
    from tilenet.onlooker import Onlooker

    onlooker = Onlooker(progress, ["tilenet", *arguments], summary)
    onlookers.append(onlooker)
    try:
        yield onlooker
    except (TilenetError, InterruptError) as error:
        onlooker.end(error.code, error)
        raise
    except Exception as error:
        onlooker.end(1, TilenetError(f"a defect in tilenet: {error!r}", code=1))
        raise
    finally:
        onlookers.remove(onlooker)


def predict(  # noqa: PLR0913 - one parameter is one option
    inputs: Annotated[
        list[str] | None,
        typer.Argument(help="Rasters or Zarr stores, folders of them, 'patterns/**/*.svs'."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            help="x.zarr, x.tif (COG), x.ome.tif, x.png, s3://…/x.zarr; a folder for several.",
        ),
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(help="An OME-Zarr image that gets the mask as a label, instead of --out."),
    ] = None,
    manifest: Annotated[
        str | None, typer.Option(help="A file that names inputs, one a line; - is stdin.")
    ] = None,
    skip_finished: Annotated[
        bool | None,
        typer.Option("--skip-finished", help="Leave inputs alone whose masks are there."),
    ] = None,
    model: Model = None,
    model_config: Annotated[
        Path | None,
        typer.Option(help="A tilenet.json that beats the model's own.", readable=False),
    ] = None,
    tile: Annotated[str | None, typer.Option(help="Tile side in pixels, or auto.")] = None,
    overlap: Annotated[
        str | None, typer.Option(help="Pixels neighbouring tiles share, or auto.")
    ] = None,
    blend: Annotated[
        str | None, typer.Option(help="gaussian (default), hann, linear or crop.")
    ] = None,
    batch_size: Annotated[
        str | None, typer.Option(help="Tiles per forward call on a GPU, or auto.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:i.")] = None,
    backend: Annotated[
        str | None, typer.Option(help="auto, torch, openvino, or inductor (compiled torch).")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16.")] = None,
    level: Annotated[int | None, typer.Option(help="Pyramid level; 0 is full resolution.")] = None,
    mpp: Annotated[
        float | None, typer.Option(help="Micrometres per pixel to read at (slides).")
    ] = None,
    resolution: Annotated[
        float | None, typer.Option(help="CRS units per pixel to read at (maps).")
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="A raster whose grid (CRS, pixels) the mask has.", readable=False),
    ] = None,
    mosaic: Annotated[
        bool | None, typer.Option("--mosaic", help="See all inputs as one raster: one mask.")
    ] = None,
    source_mpp: Annotated[
        float | None, typer.Option(help="Micrometres per pixel of the file, if it says none.")
    ] = None,
    plane: Annotated[str | None, typer.Option(help="Plane of a stack, as in z=3,t=0.")] = None,
    variable: Annotated[
        str | None, typer.Option(help="Array of a Zarr store, by its path inside.")
    ] = None,
    bands: Annotated[
        str | None, typer.Option(help="Bands from 1, as in 4,3,2, or by name: B04,B03,B02.")
    ] = None,
    scaling: Annotated[
        str | None, typer.Option(help="What a file's scale and offset do: apply, or stored.")
    ] = None,
    aoi: Annotated[
        Path | None, typer.Option(help="Polygons outside which nothing is done.", readable=False)
    ] = None,
    within: Annotated[
        str | None, typer.Option(help="none (default), auto (tissue, data), or a mask's FILE.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Score from which a class counts.")
    ] = None,
    probabilities: Annotated[
        bool | None, typer.Option("--probabilities", help="Store them, one byte per class.")
    ] = None,
    format: Annotated[str | None, typer.Option(help="zarr, cog, ome-tiff or png.")] = None,
    zarr_format: Annotated[str | None, typer.Option(help="auto, 2 or 3.")] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="local, processes:N, cuda, tls://…, tcp://…, file:PATH, slurm:FILE, pbs:FILE, "
            "k8s:NAME."
        ),
    ] = None,
    dask_report: Annotated[
        Path | None, typer.Option(help="Write Dask's performance report, HTML, here.")
    ] = None,
    part: Annotated[
        str | None, typer.Option(help="Do share I/N of the work; auto: as the job array says.")
    ] = None,
    block: Annotated[int | None, typer.Option(help="Block side: whole chunks.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Chunk side of the store.")] = None,
    no_skip: Annotated[
        bool | None, typer.Option("--no-skip", help="Forward tiles of nodata too (same mask).")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="Class names, for a model without tilenet.json.")
    ] = None,
    mean: Annotated[str | None, typer.Option(help="One number, or one per band.")] = None,
    std: Annotated[str | None, typer.Option(help="One number, or one per band.")] = None,
    value_range: Annotated[str | None, typer.Option(help="lo,hi of the pixels.")] = None,
    activation: Annotated[str | None, typer.Option(help="softmax, sigmoid or none.")] = None,
    stac: Annotated[
        bool | None, typer.Option("--stac", help="Write a STAC item beside each mask.")
    ] = None,
    overwrite: Annotated[
        bool | None, typer.Option("--overwrite", help="Replace an output of tilenet's.")
    ] = None,
    strict: Annotated[
        bool | None, typer.Option("--strict", help="Stop where pixels cannot be read (exit 3).")
    ] = None,
    read_timeout: Annotated[
        float | None, typer.Option(help="Seconds after which a read counts as stuck.")
    ] = None,
    allow_remote: Annotated[
        bool | None,
        typer.Option("--allow-remote", help="Read s3://… and other URLs, and VRT; write s3://…"),
    ] = None,
    scratch: Annotated[
        Path | None, typer.Option(help="Where a mask for s3://… is made first.")
    ] = None,
    insecure_cluster: Annotated[
        bool | None, typer.Option("--insecure-cluster", help="Take tcp:// beyond this machine.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and estimate only.")] = False,
    csv: Annotated[
        Path | None, typer.Option(help="Write pixels and area per input and class here too.")
    ] = None,
    summary: Annotated[
        Path | None, typer.Option(help="Write what became of each input here, however it ends.")
    ] = None,
    progress: Annotated[
        str, typer.Option(help="On stderr: auto, bar, log, json (lines) or none.")
    ] = "auto",
    as_json: Json = False,
    config: Annotated[Path | None, typer.Option(help="Options from a TOML file.")] = None,
    debug: Debug = False,
) -> None:
    """Segment rasters into masks. The same command again resumes after a crash."""
    # With boto3, rasterio takes 0.2 s longer to import, and a session each time it opens or reads,
    # to hand GDAL the credentials that it finds in the environment by itself.
    with not_collecting(), asking_once(), without_module("boto3"):
        from tilenet import api
        from tilenet.config import load_config

    del debug
    flags = {
        "manifest": manifest, "skip_finished": skip_finished,
        "into": into, "model": model, "model_config_file": model_config, "tile": tile,
        "overlap": overlap, "blend": blend, "batch_size": batch_size, "device": device,
        "backend": backend, "precision": precision, "level": level, "mpp": mpp,
        "resolution": resolution, "like": like, "mosaic": mosaic, "source_mpp": source_mpp,
        "plane": plane, "variable": variable, "bands": bands, "scaling": scaling, "aoi": aoi,
        "within": within,
        "threshold": threshold, "probabilities": probabilities, "format": format,
        "zarr_format": zarr_format, "scheduler": scheduler, "dask_report": dask_report,
        "part": part,
        "block": block, "chunk": chunk, "stac": stac,
        "skip_nodata": False if no_skip else None, "overwrite": overwrite,
        "strict": strict, "read_timeout": read_timeout, "allow_remote": allow_remote,
        "scratch": scratch, "insecure_cluster": insecure_cluster,
        "classes": classes, "mean": mean, "std": std, "value_range": value_range,
        "activation": activation,
    }  # fmt: skip
    options = load_config(config, {key: value for key, value in flags.items() if value is not None})
    _check_apart({"--out": out, "--csv": csv, "--summary": summary, "--dask-report": dask_report})
    inputs = inputs or []
    if dry_run:
        estimates = list(api.estimate(inputs, out, options))
        document = {"estimate": estimates[0] if api.is_single(inputs, options) else estimates}
        show(document if as_json else json.dumps(document["estimate"], indent=1))
        errors = [one["error"] for one in estimates if "error" in one]
        told = [str(TilenetError(one["what"], one["where"], one["do"])) for one in errors]
        _complain_of(told, len(estimates))
        raise typer.Exit(7 if errors else 0)
    from tilenet.summary import check_csv, lines, write_csv

    if csv is not None:
        check_csv(csv)
    with _onlooking(progress, summary) as look:
        result = api.predict(inputs, out, options, listener=look)
        if csv is not None and result.complete:
            write_csv(result, csv)
        single = api.is_single(inputs, options)
        # Before the record says how it ended: stdout may not take it.
        if as_json:
            show(result.first_as_dict() if single else result.as_dict())
        else:
            for output in result.outputs:
                show(output)
        look.end(result.exit_code)
    for line in lines(result) if not as_json and progress != "json" else ():
        tell(line)
    _complain_of([failure.error for failure in result.failed], None if single else result.inputs)
    raise typer.Exit(result.exit_code)


def _check_apart(places: dict[str, str | Path | None]) -> None:
    """Raise UsageError where two of what is written would be one file."""
    known = dict[Path, str]()
    for option, place in places.items():
        other = option if place is None else known.setdefault(Path(place).absolute(), option)
        if other != option:
            raise UsageError(f"{other} and {option} are one file", place, "name two")


def _complain_of(errors: Sequence[str], inputs: int | None) -> None:
    """Say why inputs failed, in a line for each, and how many of several."""
    for error in errors[:_MAX_LISTED]:
        complain(error)
    if errors and inputs is not None:
        complain(f"{len(errors)} of {inputs} inputs failed, in whole or in part")
