"""`tilenet.json`: what predict must know of a network besides its weights."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    field_validator,
    model_validator,
)

from tilenet.blend import LIMIT_BITS, Activation
from tilenet.classes import ClassInfo, default_classes
from tilenet.errors import ModelError
from tilenet.strangers import parse_json

__all__ = ["SCHEMA", "ModelCard", "parse_card"]

SCHEMA = 1

Byte = Annotated[int, Field(ge=0, le=255)]
Margin = Annotated[int, Field(ge=0, le=4096)]
Side = Annotated[FiniteFloat, Field(gt=0)]


class _Class(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    id: Annotated[int, Field(ge=0, le=254)]
    name: str
    color: tuple[Byte, Byte, Byte] | None = None


class ModelCard(BaseModel):
    """The validated content of a `tilenet.json`.

    The network's input is ``((pixel - lo) / (hi - lo) - mean) / std`` per band.

    Parameters
    ----------
    schema_ : int
        Version of these keys (``schema`` in the file).
    name : str
        Short name.
    classes : list
        ``{"id", "name", "color"}``; ids are 0, 1, 2 … in order. A one-channel network has two
        classes, a sigmoid network with K > 1 channels has K + 1. One class alone stands on a
        background, which becomes class 0.
    bands : int or list of str
        How many bands the network takes, or their names.
    value_range : tuple of float
        (lo, hi).
    mean, std : list of float
        One value, or one per band, in units of the value range.
    activation : {"softmax", "sigmoid", "none"}
        What is applied to the network's output.
    threshold : float
        Where class 1 begins for one channel, or any class for sigmoid.
    tile, overlap : int or None
        Tile side and overlap in pixels; `tile` is what the network was trained on.
    divisor : int or None
        What tile sides and origins must be multiples of.
    context : {"local", "global"} or None
        Local: fully convolutional, may run on larger tiles than it was trained on.
    margin : tuple of int
        Pixels that the network sees before and after a tile it answers, on each axis: what valid
        convolutions lose. The answer begins with the tile and may go on behind it.
    mpp, ground_resolution : float or None
        Micrometres, or metres (on a map in degrees, these), per pixel that it was trained on.
    """

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)

    schema_: Literal[1] = Field(alias="schema")
    name: str = "model"
    classes: tuple[_Class, ...]
    bands: int | tuple[str, ...]
    value_range: tuple[FiniteFloat, FiniteFloat]
    mean: tuple[FiniteFloat, ...]
    std: tuple[FiniteFloat, ...]
    activation: Activation
    threshold: FiniteFloat = 0.5
    tile: Annotated[int, Field(ge=1, le=16384)] | None = None
    overlap: Annotated[int, Field(ge=0, le=16384)] | None = None
    divisor: Annotated[int, Field(ge=1, le=4096)] | None = None
    context: Literal["local", "global"] | None = None
    margin: tuple[Margin, Margin] = (0, 0)
    mpp: Side | None = None
    ground_resolution: Side | None = None

    @field_validator("classes")
    @classmethod
    def _on_background(cls, classes: tuple[_Class, ...]) -> tuple[_Class, ...]:
        if len(classes) != 1:
            return classes
        return _Class(id=0, name="background"), classes[0].model_copy(update={"id": 1})

    @model_validator(mode="after")
    def _consistent(self) -> ModelCard:
        if not 1 <= len(self.classes) <= 255:
            raise ValueError("classes: 1 to 255 are possible")
        if [c.id for c in self.classes] != list(range(len(self.classes))):
            raise ValueError("classes: ids must be 0, 1, 2 … in order")
        if self.band_count < 1:
            raise ValueError("bands: at least 1")
        if not self.value_range[0] < self.value_range[1]:
            raise ValueError("value_range: lo must be below hi")
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.band_count):
                raise ValueError(f"{key}: give 1 or {self.band_count} numbers")
        if self.activation == "none" and abs(self.threshold) >= 1 << LIMIT_BITS:
            raise ValueError(f"threshold: scores without activation end at ±{1 << LIMIT_BITS}")
        if min(self.std) <= 0:
            raise ValueError("std: must be above 0")
        return self

    @property
    def band_count(self) -> int:
        """How many bands the network takes."""
        return self.bands if isinstance(self.bands, int) else len(self.bands)

    @property
    def offset(self) -> NDArray[np.float64]:
        """Per band, the raw value that becomes 0: the band's mean, (C,)."""
        lo, hi = self.value_range
        return np.broadcast_to(np.asarray(self.mean) * (hi - lo) + lo, self.band_count)

    @property
    def scale(self) -> NDArray[np.float64]:
        """Per band, by how many raw units the input rises by 1, (C,)."""
        lo, hi = self.value_range
        return np.broadcast_to(np.asarray(self.std) * (hi - lo), self.band_count)

    def class_infos(self) -> tuple[ClassInfo, ...]:
        """Return the classes with a colour each."""
        return _coloured(self.classes)

    def check_channels(self, channels: int, where: str) -> None:
        """Raise ModelError unless a network with so many output channels fits the classes."""
        if channels == 1 and self.activation == "softmax":
            raise ModelError(
                "softmax over one output channel is 1 everywhere", where, "set activation sigmoid"
            )
        several = self.activation == "sigmoid" or channels == 1
        wanted = channels + 1 if several else channels
        if len(self.classes) != wanted:
            raise ModelError(
                f"{len(self.classes)} classes, but {channels} output channels with activation "
                f'"{self.activation}" make {wanted}',
                where,
                "correct --classes or --activation, or what tilenet.json says of them",
            )

    def channel_names(self, channels: int) -> tuple[str, ...]:
        """Return a name for every output channel: its class."""
        names = [c.name for c in self.classes]
        return tuple(names[-channels:])


@lru_cache(maxsize=8)  # asked for every one of thousands of small images
def _coloured(classes: tuple[_Class, ...]) -> tuple[ClassInfo, ...]:
    defaults = default_classes(len(classes))
    return tuple(
        ClassInfo(c.id, c.name, c.color or d.color) for c, d in zip(classes, defaults, strict=True)
    )


def parse_card(text: bytes, where: str, overrides: dict[str, Any]) -> ModelCard:
    """Read a card; what the command line gives wins.

    Parameters
    ----------
    text : bytes
        A `tilenet.json`, or ``{}`` for a network that has none.
    where : str
        Its path, for messages.
    overrides : dict
        Keys from the command line.

    Raises
    ------
    ModelError
        Not our json, or something needed is missing or impossible.
    """
    try:
        document = parse_json(text)
    except ValueError as error:
        raise ModelError(f"not valid JSON: {error}", where, "write a tilenet.json") from error
    if not isinstance(document, dict) or (document and document.get("schema") != SCHEMA):
        raise ModelError(
            'a foreign json: "schema" is not 1', where, "give a tilenet.json with --model-config"
        )
    document = {"schema": SCHEMA} | document | overrides
    needed = ("classes", "bands", "value_range", "mean", "std", "activation")
    missing = [key for key in needed if document.get(key) is None]
    if missing:
        flags = ", ".join(f"--{key.replace('_', '-')}" for key in missing if key != "bands")
        raise ModelError(
            f"the model's {', '.join(missing)} not known", where, f"give {flags or 'bands'}"
            " or a tilenet.json"
        )  # fmt: skip
    try:
        return ModelCard.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        said = f"{key}: {message}" if key else message
        named = re.split(r"[.:]", said)[0]
        if named in overrides and named != "bands":  # on the command line, and in no file
            where = f"--{named.replace('_', '-')}"
        raise ModelError(said, where, "correct it") from error
