"""The command `train`; `tilenet.cli` registers it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tilenet.cli_options import Debug, Json
from tilenet.console import show, split_numbers, telling_problems
from tilenet.errors import UsageError

__all__ = ["train"]


def _settings(pairs: list[str] | None) -> dict[str, Any]:
    """Return `key=value` options; a value is TOML, or text where it is none."""
    import tomllib

    found: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"no key=value: {pair}", "--set", "as in --set lr=0.0003")
        try:
            found[key.replace("-", "_")] = tomllib.loads(f"v = {value}")["v"]
        except ValueError:
            found[key.replace("-", "_")] = value
    return found


def train(  # noqa: PLR0913 - one parameter for each flag
    data: Annotated[Path | None, typer.Argument(help="Folder or CSV with labelled images.")] = None,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Model folder to write.")],
    format: Annotated[
        str | None, typer.Option(help="auto, pairs, dsb, stack, vector, csv.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Polygons: GeoJSON, GPKG, GeoParquet.")
    ] = None,
    area: Annotated[Path | None, typer.Option(help="Polygons; pixels outside are ignored.")] = None,
    class_column: Annotated[str | None, typer.Option(help="Attribute with the class.")] = None,
    palette: Annotated[Path | None, typer.Option(help='File of "#rrggbb" = "class".')] = None,
    classes: Annotated[str | None, typer.Option(help="Class names in order.")] = None,
    bands: Annotated[str | None, typer.Option(help="Bands from 1, as in 4,3,2.")] = None,
    scaling: Annotated[
        str | None, typer.Option(help="What a file's scale and offset do: apply, or stored.")
    ] = None,
    val: Annotated[float | None, typer.Option(help="Share held out.")] = None,
    fold: Annotated[int | None, typer.Option(help="Which share is held out.")] = None,
    split: Annotated[str | None, typer.Option(help="auto, folder, image or block.")] = None,
    arch: Annotated[str | None, typer.Option(help="SMP architecture, or classic-unet….")] = None,
    encoder: Annotated[str | None, typer.Option(help="SMP encoder; timm's as tu-NAME.")] = None,
    encoder_weights: Annotated[str | None, typer.Option(help="imagenet, none or FILE.")] = None,
    activation: Annotated[str | None, typer.Option(help="auto, sigmoid or softmax.")] = None,
    tile: Annotated[int | None, typer.Option(help="Window side in pixels.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows per step.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps per epoch; 0 follows the data.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine, plateau or constant.")] = None,
    patience: Annotated[int | None, typer.Option(help="Epochs without gain; 0 = all.")] = None,
    loss: Annotated[
        str | None,
        typer.Option(help="bce, ce, dice, jaccard, focal, tversky, lovasz; or dice+0.5*focal."),
    ] = None,
    class_weights: Annotated[str | None, typer.Option(help="none, auto, or numbers.")] = None,
    border_w0: Annotated[float | None, typer.Option(help="U-Net's border weight; 0 = off.")] = None,
    border_sigma: Annotated[float | None, typer.Option(help="Its reach in pixels.")] = None,
    foreground: Annotated[float | None, typer.Option(help="Share of windows at objects.")] = None,
    balance: Annotated[
        bool | None, typer.Option("--balance", help="Windows at every class equally often.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16.")] = None,
    workers: Annotated[int | None, typer.Option(help="Loader processes; -1 chooses.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    track: Annotated[str | None, typer.Option(help="csv, tensorboard or mlflow.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any other key of train.toml: key=value.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Options from a TOML file.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --out.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a network on labelled images; the folder it writes is a model for predict."""
    del debug  # read by `tilenet.cli.run`, which prints errors
    weights: Any = class_weights
    if weights not in (None, "none", "auto"):
        weights = split_numbers(weights, float, "--class-weights")
    flags: dict[str, Any] = {
        "data": data, "format": format, "labels": labels, "area": area,
        "class_column": class_column, "palette": palette,
        "classes": None if classes is None else tuple(classes.split(",")),
        "bands": split_numbers(bands, int, "--bands"), "scaling": scaling,
        "val": val, "fold": fold, "split": split, "arch": arch, "encoder": encoder,
        "encoder_weights": encoder_weights, "activation": activation, "tile": tile,
        "batch_size": batch_size, "epochs": epochs, "steps": steps, "lr": lr,
        "schedule": schedule, "patience": patience, "loss": loss, "class_weights": weights,
        "border_w0": border_w0, "border_sigma": border_sigma, "foreground": foreground,
        "balance": balance, "device": device, "precision": precision, "workers": workers,
        "seed": seed, "track": track,
    }  # fmt: skip
    given = {key: value for key, value in flags.items() if value is not None}
    if resume and data is None and config is None:
        config = out / "train.toml"
    _run(
        _settings(settings) | given,
        config,
        out,
        resume=resume,
        overwrite=overwrite,
        as_json=as_json,
    )


def _run(
    flags: dict[str, Any], config: Path | None, out: Path,
    *, resume: bool, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    from importlib.util import find_spec

    missing = [name for name in ("accelerate", "torchmetrics") if find_spec(name) is None]
    if missing:
        raise UsageError(
            "training needs the extra train", f"{missing[0]} is not installed",
            "pip install tilenet[train]",
        )  # fmt: skip
    from tilenet.training.config import load_train_config
    from tilenet.training.workers import start_workers

    options = load_train_config(config, flags)
    if options.workers:
        start_workers()  # they import torch while this process does
    from tilenet import train_api
    from tilenet.training.bar import TrainingBar

    with telling_problems(), TrainingBar() as bar:
        result = train_api.train(
            options, out, given=frozenset(options.model_fields_set),
            resume=resume, overwrite=overwrite, progress=bar,
        )  # fmt: skip
    if result.metrics:  # the first of several processes speaks for all
        show(result.as_dict() if as_json else result.output)
