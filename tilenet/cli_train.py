"""The commands `train` and `evaluate`; `tilenet.cli` registers them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tilenet.errors import InputError, UsageError, one_line

__all__ = ["evaluate", "train"]

_MAX_LISTED = 50

Flag = Annotated[bool | None, typer.Option()]
Text = Annotated[str | None, typer.Option()]


def _numbers(text: str | None, flag: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"no numbers: {text}", flag, "numbers with commas between them") from None


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


def _bands(text: str | None) -> tuple[int, ...] | None:
    numbers = _numbers(text, "--bands")
    return None if numbers is None else tuple(int(number) for number in numbers)


def _complain(text: str) -> None:
    sys.stderr.write(f"tilenet: error: {one_line(text)}\n")


def _print(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document, ensure_ascii=False, indent=1) + "\n")


def _list_problems(error: InputError) -> None:
    """Write one line for each broken pair."""
    problems = getattr(error, "problems", ())
    for problem in problems[:_MAX_LISTED]:
        _complain(str(problem))
    if len(problems) > _MAX_LISTED:
        _complain(f"and {len(problems) - _MAX_LISTED} more")


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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Train a network on labelled images; the folder it writes is a model for predict."""
    del debug  # read by `tilenet.cli.run`, which prints errors
    weights = class_weights
    flags: dict[str, Any] = _settings(settings) | {
        "data": data, "format": format, "labels": labels, "area": area,
        "class_column": class_column, "palette": palette,
        "classes": None if classes is None else tuple(classes.split(",")),
        "bands": _bands(bands),
        "val": val, "fold": fold, "split": split, "arch": arch, "encoder": encoder,
        "encoder_weights": encoder_weights, "activation": activation, "tile": tile,
        "batch_size": batch_size, "epochs": epochs, "steps": steps, "lr": lr,
        "schedule": schedule, "patience": patience, "loss": loss,
        "class_weights": weights if weights in (None, "none", "auto")
        else _numbers(weights, "--class-weights"),
        "border_w0": border_w0, "border_sigma": border_sigma, "foreground": foreground,
        "balance": balance, "device": device, "precision": precision, "workers": workers,
        "seed": seed, "track": track,
    }  # fmt: skip
    flags = {key: value for key, value in flags.items() if value is not None}
    if resume and data is None and config is None:
        config = out / "train.toml"
    _run_training(flags, config, out, resume=resume, overwrite=overwrite, as_json=as_json)


def _run_training(
    flags: dict[str, Any], config: Path | None, out: Path,
    *, resume: bool, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    from tilenet.training.config import load_train_config

    options = load_train_config(config, flags)
    from tilenet import train_api
    from tilenet.training.bar import TrainingBar

    given = frozenset(flags)
    try:
        with TrainingBar() as bar:
            result = train_api.train(
                options, out, given=given, resume=resume, overwrite=overwrite, progress=bar
            )
    except InputError as error:
        _list_problems(error)
        raise
    if as_json:
        _print(result.as_dict())
    else:
        sys.stdout.write(f"{result.output}\n")


def evaluate(  # noqa: PLR0913 - one parameter for each flag
    pred: Annotated[Path | None, typer.Option(help="Mask, or folder of masks.")] = None,
    truth: Annotated[Path | None, typer.Option(help="Truth on the same grid.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="As for predict.")] = None,
    data: Annotated[Path | None, typer.Option(help="Labelled images, as for train.")] = None,
    format: Annotated[str | None, typer.Option(help="As for train.")] = None,
    labels: Annotated[Path | None, typer.Option(help="As for train.")] = None,
    area: Annotated[Path | None, typer.Option(help="As for train.")] = None,
    class_column: Annotated[str | None, typer.Option(help="As for train.")] = None,
    palette: Annotated[Path | None, typer.Option(help="As for train.")] = None,
    bands: Annotated[str | None, typer.Option(help="Bands from 1, as in 4,3,2.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Compare a mask with the truth, or run a model over labelled images and compare."""
    del debug
    pair, run = (pred, truth), (model, data)
    if (None in pair and None in run) or (any(pair) and any(run)):
        raise UsageError("two things to compare", "--pred --truth, or --model --data", "give both")
    from tilenet import train_api

    if pred is not None and truth is not None:
        document = train_api.evaluate(pred, truth).as_dict()
    else:
        from tilenet.training.config import load_train_config

        flags = {
            "data": data, "format": format, "labels": labels, "area": area, "palette": palette,
            "class_column": class_column,
            "bands": _bands(bands),
        }  # fmt: skip
        options = load_train_config(None, {k: v for k, v in flags.items() if v is not None})
        try:
            document = train_api.evaluate_model(str(model), options).as_dict()
        except InputError as error:
            _list_problems(error)
            raise
    _print(document) if as_json else sys.stdout.write(_page(document))


def _page(document: dict[str, Any]) -> str:
    """Return the figures as lines for a person."""
    keys = ("dice", "iou", "precision", "recall")

    def cell(value: float | None) -> str:
        return f"{'–' if value is None else f'{value:.4f}':>10}"

    lines = [
        f"{'class':<20}" + "".join(f"{key:>10}" for key in keys),
        *(
            f"{row['name']:<20}" + "".join(cell(row[key]) for key in keys)
            for row in document["classes"]
        ),
        f"{'mean':<20}" + cell(document["mean_dice"]) + cell(document["mean_iou"]),
        f"{'accuracy':<20}" + cell(document["accuracy"]),
    ]
    return "\n".join(lines) + "\n"
