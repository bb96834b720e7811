"""`report.html`: curves, data, pictures and figures in one file that needs no other."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tilenet import durable
from tilenet.classes import NODATA, ClassInfo
from tilenet.geometry import Window
from tilenet.sources.gdal import environment
from tilenet.training.images import open_image
from tilenet.training.labels import read_keys
from tilenet.training.metrics import Scores
from tilenet.training.truth import Judged

__all__ = ["write_report"]

_PICTURES = 3
_MOST_PIXELS = 512
_MOST_TEXT = 20_000
_WIDTH, _HEIGHT, _PAD = 640, 240, 44
_COLOURS = ("#0072b2", "#d55e00", "#009e73")
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;
text-align:right}td:first-child,th:first-child{text-align:left}img{max-width:100%;display:block;
margin:.3em 0 1.2em}pre{background:#f6f6f6;padding:1em;overflow:auto;font-size:13px}
svg text{font:12px system-ui,sans-serif;fill:#555}
"""


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "–" if value is None else html.escape(str(value))


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{_text(h)}</th>" for h in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{_text(v)}</td>" for v in row) + "</tr>" for row in rows]
    return "<table>" + "".join(lines) + "</table>"


def _curve(history: Sequence[Mapping[str, Any]], keys: Sequence[str], title: str) -> str:
    """Return one chart as SVG: a line per key over the epochs."""
    values = [row[key] for row in history for key in keys if np.isfinite(row[key])]
    if not values:
        return ""
    low, high = min(0.0, *values), max(values) or 1.0
    high = 1.0 if 0.5 < high <= 1 and title != "loss" else high
    inner_width, inner_height = _WIDTH - 2 * _PAD, _HEIGHT - 2 * _PAD

    def place(index: int, value: float) -> str:
        x = _PAD + inner_width * index / max(1, len(history) - 1)
        y = _PAD + inner_height * (1 - (value - low) / ((high - low) or 1))
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg role="img" aria-label="{title}" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}">',
        f'<text x="{_PAD}" y="20">{title}</text>',
        f'<path d="M{_PAD} {_PAD}V{_HEIGHT - _PAD}H{_WIDTH - _PAD}" fill="none" stroke="#aaa"/>',
        f'<text x="4" y="{_PAD + 4}">{high:.3g}</text>',
        f'<text x="4" y="{_HEIGHT - _PAD}">{low:.3g}</text>',
        f'<text x="{_WIDTH - _PAD - 60}" y="{_HEIGHT - 12}">epoch {len(history)}</text>',
    ]
    for number, (key, colour) in enumerate(zip(keys, _COLOURS, strict=False)):
        points = " ".join(
            place(k, row[key]) for k, row in enumerate(history) if np.isfinite(row[key])
        )
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        x = _PAD + 120 + 150 * number
        parts.append(f'<text x="{x}" y="20" style="fill:{colour}">{_text(key)}</text>')
    return "".join([*parts, "</svg>"])


def _as_rgb(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Stretch the first one or three bands, (C, h, w), to (h, w, 3) between their 1 and 99 %."""
    bands = pixels[:3] if len(pixels) >= 3 else pixels[[0, 0, 0]]
    low, high = (np.percentile(bands, q, axis=(1, 2), keepdims=True) for q in (1, 99))
    if pixels.dtype == np.uint8:
        low, high = np.zeros_like(low), np.full_like(high, 255)
    scaled = (bands - low) / np.maximum(high - low, 1e-9)
    return np.moveaxis((scaled.clip(0, 1) * 255).astype(np.uint8), 0, -1)


def _as_colours(mask: NDArray[np.uint8], classes: Sequence[ClassInfo]) -> NDArray[np.uint8]:
    table = np.full((256, 3), 128, np.uint8)
    for c in classes:
        table[c.id] = c.color
    return table[mask]


def _picture(judged: Judged, classes: Sequence[ClassInfo]) -> str:
    """Return image, truth and prediction side by side as an embedded PNG."""
    extent = judged.sample.extent
    height, width = (min(_MOST_PIXELS, side) for side in (extent.height, extent.width))
    window = Window(
        extent.row + (extent.height - height) // 2, extent.col + (extent.width - width) // 2,
        height, width,
    )  # fmt: skip
    image = open_image(judged.sample.image)
    with environment():
        pixels, _ = image.read(window)
    image.close()
    truth = judged.sample.label.read(window)[0]
    pred = read_keys(str(judged.mask), 0, window).clip(0, NODATA).astype(np.uint8)
    gap = np.full((height, 6, 3), 255, np.uint8)
    planes = [_as_rgb(pixels), gap, _as_colours(truth, classes), gap, _as_colours(pred, classes)]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(planes, axis=1)).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    dice = Scores(judged.matrix).object_dice
    return (
        f"<p>{_text(judged.sample.name)}: Dice {dice:.4f}; image | truth | prediction</p>"
        f'<img alt="image, truth, prediction" src="data:image/png;base64,{data}">'
    )


def _pictures(judged: Sequence[Judged], classes: Sequence[ClassInfo]) -> list[str]:
    labelled = [one for one in judged if one.matrix.any()]
    ranked = sorted(labelled, key=lambda one: (-Scores(one.matrix).object_dice, one.sample.name))
    best, rest = ranked[:_PICTURES], ranked[_PICTURES:]
    parts = ["<h2>Best</h2>", *(_picture(one, classes) for one in best)]
    if rest:
        parts += ["<h2>Worst</h2>", *(_picture(one, classes) for one in rest[::-1][:_PICTURES])]
    return parts


def _validation(scores: Mapping[str, Any]) -> list[str]:
    rows = [
        [c["name"], c["dice"], c["iou"], c["precision"], c["recall"]] for c in scores["classes"]
    ]
    rows.append(["mean", scores["mean_dice"], scores["mean_iou"], None, None])
    return [
        "<h2>Validation</h2><p>Whole images through the predict engine, tiled and blended.</p>",
        _table(["class", "Dice", "IoU", "precision", "recall"], rows),
        f"<p>Accuracy {_text(scores['accuracy'])}.</p>",
    ]


def _data(data: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    parts = [
        [name, part["images"], part["pixels"], *part["class_pixels"], part["ignored"]]
        for name, part in (("train", data["train"]), ("validation", data["val"]))
    ]
    bands = zip(range(1, len(data["mean"]) + 1), data["mean"], data["std"], strict=True)
    palette = "\n".join(data["palette"])
    return [
        f"<h2>Data</h2><p>{_text(data['layout'])}; {_text(data['split'])}.</p>",
        _table(["part", "images", "pixels", *names, "ignored"], parts),
        _table(["band", "mean", "deviation"], bands),
        f"<pre>{_text(palette)}</pre>" if palette else "",
    ]


def write_report(
    path: Path,
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    judged: Sequence[Judged],
    classes: Sequence[ClassInfo],
    recipe: str,
) -> None:
    """Write the report.

    Parameters
    ----------
    path : Path
        ``report.html``.
    metrics : mapping
        The content of `metrics.json`.
    history : sequence of mapping
        A row per epoch.
    judged : sequence of Judged
        The validation images and their masks.
    classes : sequence of ClassInfo
        Names and colours.
    recipe : str
        `train.toml`.
    """
    parts = [
        f"<h1>{_text(metrics['name'])}</h1>",
        f"<p>{_text(metrics['summary'])}</p>",
        *_validation(metrics["validation"]),
        "<h2>Course</h2>",
        _curve(history, ["loss"], "loss"),
        _curve(history, ["val_dice", "val_mean_iou", "val_accuracy"], "validation"),
        *_data(metrics["data"], [c.name for c in classes]),
        *_pictures(judged, classes),
        f"<h2>Recipe</h2><pre>{_text(recipe)}</pre>",
        f"<h2>All figures</h2><pre>{_text(json.dumps(metrics, indent=1)[:_MOST_TEXT])}</pre>",
    ]
    body = "\n".join(parts)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{_text(metrics['name'])}</title><style>{_STYLE}</style></head>"
        f"<body>{body}</body></html>\n"
    )
    durable.write(path, page.encode())
