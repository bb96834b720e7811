"""The command `evaluate`; `tilenet.cli` registers it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tilenet.cli_options import Debug, Json
from tilenet.console import show, split_numbers, telling_problems
from tilenet.errors import UsageError

__all__ = ["evaluate"]


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
    scaling: Annotated[
        str | None, typer.Option(help="What a file's scale and offset do: apply, or stored.")
    ] = None,
    device: Annotated[str, typer.Option(help="As for predict.")] = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare a mask with the truth, or run a model over labelled images and compare."""
    del debug
    pair, run = (pred, truth), (model, data)
    if (None in pair and None in run) or (any(pair) and any(run)):
        raise UsageError("two things to compare", "--pred --truth, or --model --data", "give both")
    from tilenet import evaluate_api

    if pred is not None and truth is not None:
        idle = {
            "--format": format, "--labels": labels, "--area": area, "--bands": bands,
            "--class-column": class_column, "--scaling": scaling,
            "--device": None if device == "auto" else device,
        }  # fmt: skip
        for flag, value in idle.items():
            if value is not None:
                raise UsageError("only for --model and --data", flag, "leave it out")
        document = evaluate_api.evaluate(pred, truth, palette).as_dict()
    else:
        from tilenet.training.config import load_train_config

        flags = {
            "data": data, "format": format, "labels": labels, "area": area, "palette": palette,
            "class_column": class_column, "bands": split_numbers(bands, int, "--bands"),
            "scaling": scaling,
        }  # fmt: skip
        options = load_train_config(None, {k: v for k, v in flags.items() if v is not None})
        with telling_problems():
            document = evaluate_api.evaluate_model(str(model), options, device=device).as_dict()
    show(document if as_json else _page(document))


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
    return "\n".join(lines)
