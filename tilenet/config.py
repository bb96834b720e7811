"""What a run is asked to do: frozen, validated, from flags or a TOML file."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tilenet.blend import Activation, Blend
from tilenet.errors import UsageError
from tilenet.part import Part

__all__ = ["DEFAULT_CHUNK", "PredictConfig", "load_config"]

DEFAULT_CHUNK = 768
"""Chunk side: 3·2⁸, so that blocks of whole chunks hold whole strides of the usual tiles."""


def _number_or_auto(value: object) -> object:
    if isinstance(value, str) and not re.fullmatch(r"auto|[+-]?\d+", value):
        raise ValueError(f"{value!r} is neither a whole number nor auto")
    return None if value == "auto" else value


type Auto[T] = Annotated[T | None, BeforeValidator(_number_or_auto)]
"""A whole number, or "auto" (None): chosen for the model, the raster and the device."""


def _plane(value: Any) -> Any:
    """Return ``z=3,t=0`` as pairs."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",")]
    if not all(len(axis) == 1 and index.isdecimal() for axis, _, index in pairs):
        raise ValueError(f"{value!r} is not like z=3,t=0")
    return tuple((axis.lower(), int(index)) for axis, _, index in pairs)


def _absolute(value: Path) -> Path:
    return value.absolute()  # a worker may stand elsewhere


def _manifest(value: str) -> str:
    return value if value == "-" else str(Path(value).absolute())


def _within(value: str) -> str:
    return value if value in ("none", "auto") else str(Path(value).absolute())


def _bands(value: Any) -> Any:
    """Return ``4,3,2`` or ``red,green,blue``, or one number, as numbers and names."""
    if _is_number(value):
        return (value,)
    if not isinstance(value, str):
        return value
    parts = [part.strip() for part in value.split(",")]
    if not all(parts):
        raise ValueError(f"{value!r} is not like 4,3,2 or red,green,blue")
    return tuple(int(part) if part.lstrip("-").isdecimal() else part for part in parts)


Bands = Annotated[tuple[int | str, ...] | None, BeforeValidator(_bands)]
"""Bands of a raster, from 1 or by name."""


def _numbers(value: Any) -> Any:
    """Return ``0.4,0.5``, or one number, as numbers."""
    if _is_number(value):
        return (value,)
    if not isinstance(value, str):
        return value
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError:
        raise ValueError(f"{value!r} is not like 0.5 or 0.4,0.5,0.6") from None


def _range(value: Any) -> Any:
    """Return ``0,255`` as two numbers."""
    numbers = _numbers(value)
    if isinstance(numbers, tuple | list) and len(numbers) != 2:
        raise ValueError(f"{value!r} is not like 0,255")
    return numbers


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _names(value: Any) -> Any:
    """Return ``water,road`` as names."""
    return tuple(value.split(",")) if isinstance(value, str) else value


Numbers = Annotated[tuple[FiniteFloat, ...] | None, BeforeValidator(_numbers)]
"""One number, or one per band."""


def _part(value: Any) -> Any:
    """Return the part that ``2/8`` names; "auto" asks the environment."""
    return Part.parse(value, os.environ) if isinstance(value, str) else value


class PredictConfig(BaseModel):
    """Options of predict, named as on the command line.

    Parameters
    ----------
    manifest : str or None
        A file that names inputs, one path or URL a line; "-" is standard input.
    skip_finished : bool
        Leave inputs alone whose masks are there, whatever made these.
    model : str
        Bundled name, model folder, ``.onnx`` file or ``hf://org/name``.
    model_config_file : Path or None
        A `tilenet.json` that beats the model's own.
    tile, overlap : int or None
        Pixels; None or "auto": the card's, larger if the network has no global context, smaller
        where memory is short.
    blend : Blend
        Window.
    batch_size : int or None
        Tiles per forward call on a GPU; None or "auto" follows the tile and the GPU's memory.
        Changes nothing on a CPU.
    device, backend, precision : str
        "auto" chooses the fastest.
    level : int or None
        Pyramid level to read; None: full resolution, or what the model was trained at.
    mpp, resolution : float or None
        Micrometres, or CRS units, per pixel to read at instead.
    like : Path or None
        A raster whose grid (CRS, transform, size) the mask shall have, in place of these.
    mosaic : bool
        See all inputs as one raster, and make one mask; where they overlap, the first one counts.
    source_mpp : float or None
        Micrometres per pixel of the file, in place of what it says.
    plane : tuple of (str, int)
        Index of each further axis of a stack, as in ``z=3,t=0``.
    variable : str or None
        Which array of a Zarr store, by its path inside.
    bands : tuple of int or str, or None
        Bands from 1, or by name, in the model's order; None: those of the model's names if the file
        has them, else all but alpha.
    scaling : {"apply", "stored"} or None
        What a file's scale and offset do: make the pixels, or nothing. None refuses such a file.
    aoi : Path or None
        Polygons outside which nothing is done.
    within : str
        "none", "auto" (tissue, or what has data), or a mask outside whose pixels nothing is done.
    threshold : float or None
        Beats the card's.
    probabilities : bool
        Store them too.
    format : {"zarr", "cog", "png", "ome-tiff"} or None
        None follows the output's suffix or the input.
    zarr_format : {"auto", "2", "3"}
        "auto": 3 for georeferenced input, else 2.
    scheduler : str
        "local", "processes:N", "cuda", "tcp://host:port", "tls://host:port", "file:PATH",
        "slurm:FILE", "pbs:FILE" or "k8s:NAME".
    dask_report : Path or None
        Where Dask's performance report goes, an HTML file.
    part : Part or None
        The share of the work to do, ``I/N`` with I from 1, or "auto": what SLURM, AWS Batch or
        Kubernetes say of this task. Never changes the result.
    block, chunk : int or None, int
        Pixels a side; a block is a whole number of chunks.
    skip_nodata : bool
        Skip tiles that hold no kept pixel; never changes the result.
    into : Path or None
        An OME-Zarr image that gets the mask as its label ``labels/tilenet-<model name>``.
    stac : bool
        Write a STAC item beside each mask.
    overwrite : bool
        Replace an output of ours.
    strict : bool
        Stop at pixels that cannot be read, instead of leaving them without an answer.
    read_timeout : float
        Seconds after which a read counts as stuck, and its process is ended.
    allow_remote : bool
        Read inputs that lie in an object store or on a web server; write a mask to one.
    scratch : Path or None
        Where a mask that goes to an object store is made; None: in the user's cache.
    insecure_cluster : bool
        Take a ``tcp://`` scheduler beyond this machine, to which anybody can send code.
    classes, mean, std, value_range, activation : optional
        Card keys for a model folder without a `tilenet.json`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    manifest: Annotated[str, Field(min_length=1), AfterValidator(_manifest)] | None = None
    skip_finished: bool = False
    model: str = "nuclei"
    model_config_file: Path | None = None
    tile: Auto[Annotated[int, Field(ge=1, le=16384)]] = None
    overlap: Auto[Annotated[int, Field(ge=0)]] = None
    blend: Blend = Blend.GAUSSIAN
    batch_size: Auto[Annotated[int, Field(ge=1, le=1024)]] = None
    device: str = "auto"
    backend: str = "auto"
    precision: str = "auto"
    level: Annotated[int, Field(ge=0)] | None = None
    mpp: Annotated[FiniteFloat, Field(gt=0)] | None = None
    resolution: Annotated[FiniteFloat, Field(gt=0)] | None = None
    like: Path | None = None
    mosaic: bool = False
    source_mpp: Annotated[FiniteFloat, Field(gt=0)] | None = None
    plane: Annotated[tuple[tuple[str, int], ...], BeforeValidator(_plane)] = ()
    variable: str | None = None
    bands: Bands = None
    scaling: Literal["apply", "stored"] | None = None
    aoi: Annotated[Path, AfterValidator(_absolute)] | None = None
    within: Annotated[str, Field(min_length=1), AfterValidator(_within)] = "none"
    threshold: FiniteFloat | None = None
    probabilities: bool = False
    format: Literal["zarr", "cog", "png", "ome-tiff"] | None = None
    zarr_format: Annotated[Literal["auto", "2", "3"], BeforeValidator(str)] = "auto"
    scheduler: str = "local"
    dask_report: Annotated[Path, AfterValidator(_absolute)] | None = None
    part: Annotated[Part | None, BeforeValidator(_part)] = None
    block: Annotated[int, Field(ge=1)] | None = None
    chunk: Annotated[int, Field(ge=1, le=8192)] = DEFAULT_CHUNK
    skip_nodata: bool = True
    into: Path | None = None
    stac: bool = False
    overwrite: bool = False
    strict: bool = False
    read_timeout: Annotated[float, Field(gt=0)] = 600.0
    allow_remote: bool = False
    scratch: Annotated[Path, AfterValidator(_absolute)] | None = None
    insecure_cluster: bool = False
    classes: Annotated[tuple[str, ...] | None, BeforeValidator(_names)] = None
    mean: Numbers = None
    std: Numbers = None
    value_range: Annotated[tuple[FiniteFloat, FiniteFloat] | None, BeforeValidator(_range)] = None
    activation: Activation | None = None

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_is_true(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where pydantic would take them for 1 and 0."""
        given = value if isinstance(value, list | tuple) else [value]
        flag = cls.model_fields[str(info.field_name)].annotation is bool
        if not flag and any(isinstance(one, bool) for one in given):
            raise ValueError("true and false are no values of it")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> PredictConfig:
        if self.block is not None and self.block % self.chunk:
            raise ValueError(f"block: {self.block} is no whole number of chunks of {self.chunk}")
        grids = (self.level, self.mpp, self.resolution, self.like)
        if sum(value is not None for value in grids) > 1:
            raise ValueError("level: give one of --level, --mpp, --resolution and --like")
        if self.skip_finished and self.overwrite:
            raise ValueError("skip-finished: it leaves masks alone, --overwrite does not")
        if self.into is not None and self.format not in (None, "zarr"):
            raise ValueError("format: an OME-Zarr image takes zarr only")
        if self.tile is not None and self.overlap is not None and 4 * self.overlap > 3 * self.tile:
            raise ValueError("overlap: at most 75 % of the tile")
        return self

    def card_overrides(self) -> dict[str, Any]:
        """Return the card keys that the command line gives."""
        keys: dict[str, Any] = {
            "mean": self.mean,
            "std": self.std,
            "value_range": self.value_range,
            "activation": self.activation,
            "threshold": self.threshold,
        }
        if self.classes is not None:
            keys["classes"] = [{"id": k, "name": name} for k, name in enumerate(self.classes)]
        return {key: value for key, value in keys.items() if value is not None}


_NAMES = {"model_config": "model_config_file"}  # a name that pydantic keeps for itself
_FLAGS = {"model_config_file": "--model-config", "skip_nodata": "--no-skip"}
_OF_THE_COMMAND = {
    "out", "config", "dry_run", "csv", "summary", "progress", "json", "debug",
}  # fmt: skip
"""Options that say what the command does with a result, and nothing of the mask."""


def _flag(key: object) -> str:
    return _FLAGS.get(str(key), "--" + str(key).replace("_", "-"))


def _from_file(path: Path) -> dict[str, Any]:
    """Return what a TOML file says, by the names of `PredictConfig`."""
    try:
        said = tomllib.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"the config does not read: {error}", path, "correct it") from error
    keys = {key.replace("-", "_"): value for key, value in said.items()}
    keys = {_NAMES.get(key, key): value for key, value in keys.items()}
    for key in keys:
        if key in _OF_THE_COMMAND:
            raise UsageError("not taken from a file", _flag(key), "give it on the command line")
    if "no_skip" in keys:
        value = keys.pop("no_skip")
        if not isinstance(value, bool):
            raise UsageError(f"{value!r} is not true or false", "--no-skip", "correct it")
        keys["skip_nodata"] = not value
    return keys


def load_config(path: Path | None, flags: dict[str, Any]) -> PredictConfig:
    """Return the configuration from a TOML file and flags; flags win.

    Parameters
    ----------
    path : Path or None
        A TOML file with the option names as keys, and values as on the command line or TOML's own.
    flags : dict
        Options given on the command line.

    Raises
    ------
    UsageError
        The file does not read, or a key or value is off.
    """
    keys = ({} if path is None else _from_file(path)) | flags
    try:
        return PredictConfig.model_validate(keys)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "there is no such option"
        # Of a value in a list, the option is the first part.
        key = first["loc"][0] if first["loc"] else message.partition(":")[0]
        raise UsageError(message, _flag(key), "see tilenet predict --help") from error
