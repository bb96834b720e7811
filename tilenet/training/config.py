"""What a training run is asked to do: frozen, validated, from flags or TOML, back to TOML."""

from __future__ import annotations

import json
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tilenet.errors import UsageError

__all__ = ["Format", "Track", "TrainConfig", "dump_toml", "load_train_config"]


class Format(StrEnum):
    """How images and labels lie on disk."""

    AUTO = "auto"
    PAIRS = "pairs"  # two folders of equal stems, or one folder with a suffix
    DSB = "dsb"  # one folder per image, one mask file per object
    STACK = "stack"  # two multi-page TIFFs, page by page
    VECTOR = "vector"  # rasters and a file of polygons
    CSV = "csv"  # a table with the columns image and mask


class Track(StrEnum):
    """Where the course of a run is written, besides metrics.csv."""

    CSV = "csv"
    TENSORBOARD = "tensorboard"
    MLFLOW = "mlflow"


LOSSES = ("bce", "ce", "dice", "focal", "jaccard", "lovasz", "tversky")

_DECIDED = frozenset(
    ("schema", "classes", "bands", "value_range", "mean", "std", "activation", "divisor",
     "context", "margin")
)  # fmt: skip

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Amount = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class TrainConfig(BaseModel):
    """Options of train, named as on the command line.

    Parameters
    ----------
    data : Path
        Folder, CSV manifest, or a folder with rasters and polygons.
    format : Format
        Layout; "auto" recognises it.
    labels, area : Path or None
        Polygons of the objects; polygons outside which pixels are ignored. None searches `data`.
    class_column : str or None
        Attribute of the polygons that names their class; None: all are one class.
    palette : Path or None
        TOML or JSON file that maps mask values or "#rrggbb" colours to class names or "ignore".
    classes : tuple of str or None
        Class names in order; None names them by what is found.
    bands : tuple of int or None
        Bands from 1; None takes all but alpha.
    scaling : {"apply", "stored"} or None
        What an image's scale and offset do: make the pixels, or nothing. None refuses such images.
    val : float
        Share of the images (or spatial blocks) that is held out.
    fold : int
        Which share: an image is held out where sha1(name) mod round(1/val) is `fold`.
    split : {"auto", "folder", "image", "block"}
        What is held out as a whole.
    arch, encoder : str
        SMP architecture, or a classic U-Net; SMP encoder (timm's as "tu-NAME").
    encoder_weights : str
        "none", "imagenet" (needs a hub), or a file.
    options : dict
        Further keyword arguments of the architecture.
    activation : {"auto", "sigmoid", "softmax"}
        "auto": one sigmoid channel for two classes, else softmax.
    tile, batch_size, epochs, steps : int
        Window side in pixels, windows per step, epochs, steps per epoch (0 follows the pixels).
    lr, weight_decay, warmup, clip : float
        AdamW's highest rate and decay; share of steps to warm up; gradient norm (0 = no clipping).
    schedule : {"cosine", "plateau", "constant"}
        How the rate falls after the warm-up.
    ema : float
        Share of the run over which weights are averaged; 0 keeps the raw weights.
    patience : int
        Epochs without a better validation Dice after which training stops; 0 never.
    loss : str
        A loss or a sum, as in "dice+bce" or "dice+0.5*focal"; "auto": dice+bce or dice+ce.
    class_weights : "none", "auto" or tuple of float
        "auto": inverse square root of the classes' shares, mean 1.
    border_w0, border_sigma : float
        The U-Net paper's border weight from separate objects; 0 leaves it out; sigma in pixels.
    foreground : float
        Share of windows centred on a pixel that is not class 0.
    balance : bool
        Centre those windows on every class equally often.
    often : dict of str to float
        How many times as often as by its pixels windows are cut from the images whose name
        matches: shell patterns, the first match counts, as in {"he_*" = 5}.
    flip, turn : bool
        Mirror; quarter turns.
    rotate : float
        Degrees at most.
    scale : tuple of float
        Smallest and largest zoom.
    elastic, brightness, contrast, gamma, saturation, noise, blur : float
        Strengths; 0 leaves one out.
    mean, std : tuple of float or None
        In units of the value range; None measures them on the training part.
    device, precision : str
        "auto" chooses.
    workers : int
        Loader processes; -1 chooses.
    seed : int
        Everything random.
    track : Track
        Besides metrics.csv.
    engine_images : int
        Validation images at most that the finished model is run over by predict; 0 = all.
    half_weights : bool
        Write the model's weights in half precision: half the size.
    card : dict
        Further keys of `tilenet.json`, as in {description = "…", mpp = 0.5}.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Path
    format: Format = Format.AUTO
    labels: Path | None = None
    area: Path | None = None
    class_column: str | None = None
    palette: Path | None = None
    classes: tuple[str, ...] | None = None
    bands: tuple[int, ...] | None = None
    scaling: Literal["apply", "stored"] | None = None
    val: Annotated[float, Field(gt=0, lt=1)] = 0.2
    fold: Annotated[int, Field(ge=0)] = 0
    split: Literal["auto", "folder", "image", "block"] = "auto"

    arch: str = "unet"
    encoder: str = "resnet34"
    encoder_weights: str = "none"
    options: dict[str, Any] = Field(default_factory=dict)
    activation: Literal["auto", "sigmoid", "softmax"] = "auto"

    tile: Annotated[int, Field(ge=8, le=4096)] = 256
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 8
    epochs: Count = 40
    steps: Annotated[int, Field(ge=0)] = 0
    lr: Positive = 1e-3
    weight_decay: Amount = 1e-4
    warmup: Share = 0.05
    clip: Amount = 1.0
    schedule: Literal["cosine", "plateau", "constant"] = "cosine"
    ema: Share = 0.05
    patience: Annotated[int, Field(ge=0)] = 0

    loss: str = "auto"
    class_weights: Literal["none", "auto"] | tuple[float, ...] = "none"
    border_w0: Amount = 0.0
    border_sigma: Positive = 5.0
    foreground: Share = 0.5
    balance: bool = False
    often: dict[str, Positive] = Field(default_factory=dict)

    flip: bool = True
    turn: bool = True
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    scale: tuple[Positive, Positive] = (0.8, 1.25)
    elastic: Amount = 0.0
    brightness: Amount = 0.2
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.2
    gamma: Amount = 0.2
    saturation: Annotated[float, Field(ge=0, le=1)] = 0.0
    noise: Amount = 0.05
    blur: Amount = 0.5

    mean: tuple[float, ...] | None = None
    std: tuple[Positive, ...] | None = None
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    workers: Annotated[int, Field(ge=-1, le=64)] = -1
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    track: Track = Track.CSV
    engine_images: Annotated[int, Field(ge=0)] = 0
    half_weights: bool = False
    card: dict[str, Any] = Field(default_factory=dict)

    @field_validator("data", "labels", "area", "palette")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        # train.toml must mean the same from any folder.
        return None if path is None else path.expanduser().absolute()

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.scale[0] > self.scale[1]:
            raise ValueError("scale: the smallest zoom comes first")
        if self.fold >= self.folds:
            raise ValueError(f"fold: val {self.val} makes folds 0 to {self.folds - 1}")
        if self.loss != "auto":
            self.loss_terms()
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean: give both mean and std, or neither")
        decided = sorted(_DECIDED & set(self.card))
        if decided:
            raise ValueError(f"card: training itself decides {', '.join(decided)}")
        return self

    @property
    def folds(self) -> int:
        """How many shares the images are cut into."""
        return max(2, round(1 / self.val))

    def loss_terms(self, channels: int = 1) -> tuple[tuple[float, str], ...]:
        """Return the loss as factors and names; "auto" follows the output channels."""
        text = self.loss
        if text == "auto":
            text = "dice+bce" if channels == 1 else "dice+ce"
        terms = []
        for part in text.split("+"):
            factor, _, name = part.strip().rpartition("*")
            if name not in LOSSES:
                raise ValueError(f"loss: no {name!r}; there are {', '.join(LOSSES)}")
            try:
                terms.append((float(factor) if factor else 1.0, name))
            except ValueError:
                raise ValueError(f"loss: {factor!r} is no number") from None
        return tuple(terms)


def load_train_config(path: Path | None, flags: dict[str, Any]) -> TrainConfig:
    """Return the configuration from a TOML file and flags; flags win.

    Parameters
    ----------
    path : Path or None
        A TOML file with the option names as keys; a relative path in it starts at the file.
    flags : dict
        Options given on the command line.

    Raises
    ------
    UsageError
        The file does not read, or a key or value is off.
    """
    keys: dict[str, Any] = {}
    if path is not None:
        try:
            keys = tomllib.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"the config does not read: {error}", path, "correct it") from error
        keys = {key.replace("-", "_"): value for key, value in keys.items()}
        for key in ("data", "labels", "area", "palette"):
            if isinstance(keys.get(key), str):
                keys[key] = path.absolute().parent / keys[key]
    keys |= flags
    if keys.get("data") is None:
        raise UsageError("no data", "DATA", "give a folder, or a --config that names one")
    try:
        return TrainConfig.model_validate(keys)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        names = [str(part) for part in first["loc"]] or [message.partition(":")[0]]
        option = "--" + names[0].replace("_", "-")
        raise UsageError(message, option, "see tilenet train --help") from error


def _value(value: Any) -> str:
    # JSON's strings, numbers, booleans and lists are TOML's too.
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def dump_toml(config: TrainConfig) -> str:
    """Return the configuration as TOML that `load_train_config` reads back."""
    document = config.model_dump(mode="json", exclude_none=True)
    lines = [f"{key} = {_value(value)}" for key, value in document.items()]
    return "\n".join(lines) + "\n"
