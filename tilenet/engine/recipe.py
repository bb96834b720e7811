"""What a finished mask keeps so that any of its blocks can be made again: the plan, made portable.

It says where raster and model lay and how the work was cut; nothing of threads, batches and
schedulers, so the same mask has the same recipe however it was made.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from tilenet.blend import Blend
from tilenet.engine.plan import Plan
from tilenet.errors import InputError, ModelError, without_secrets
from tilenet.lattice import Axis, Lattice
from tilenet.models.card import parse_card
from tilenet.models.session import network_shape
from tilenet.models.sizes import Wanted, choose_sizes
from tilenet.models.store import BUNDLED, ModelFiles, identified
from tilenet.sinks import MaskSpec
from tilenet.sources import Area, Grid, View, open_raster

__all__ = ["lattice_of", "plan_from", "recipe_of"]

_HOME = "bundled:"


def recipe_of(plan: Plan) -> dict[str, Any]:
    """Return the recipe of a plan as plain JSON values."""
    rows, cols = plan.lattice.rows, plan.lattice.cols
    return {
        "input": without_secrets(plan.raster.path),
        "view": _portable(plan.raster.view),
        "model": {
            "kind": plan.model.kind,
            "weights": _place_of(plan.model.weights),
            "config": plan.model.config,
            "card": plan.model.card.model_dump(mode="json", by_alias=True),
        },
        "fixed_tile": rows.fixed,
        "block": [rows.core, cols.core],
        "blend": str(plan.blend),
        "skip_nodata": plan.skip_nodata,
        "area": None if plan.area is None else _areas().dump_python(plan.area, mode="json"),
        **({"lowered": True} if plan.lowered else {}),
    }


@lru_cache(maxsize=8)  # thousands of small images have one model
def _place_of(weights: Path) -> str:
    """Return where weights lie; of those that are bundled, in any installation."""
    bundled = weights.is_relative_to(BUNDLED)
    return f"{_HOME}{weights.relative_to(BUNDLED)}" if bundled else str(weights)


@lru_cache(maxsize=1)
def _areas() -> TypeAdapter[Area]:
    return TypeAdapter(Area)  # takes long to make


def _area_of(recipe: dict[str, Any]) -> Area | None:
    """Return where the work mattered; raises InputError if a mask that said so has changed."""
    if recipe.get("area") is None:
        return None
    area = _areas().validate_python(recipe["area"])
    area.check()
    return area


def _model_of(recipe: dict[str, Any], model: Path | None) -> ModelFiles:
    kept = recipe["model"]
    name = kept["weights"]
    weights = BUNDLED / name.removeprefix(_HOME) if name.startswith(_HOME) else Path(name)
    if model is not None:
        weights = model / "model.safetensors" if model.is_dir() else model
    if not weights.is_file():
        raise ModelError("the model is not where it was", weights, "give it with --model")
    card = parse_card(json.dumps(kept["card"]).encode(), str(weights), {})
    return identified(ModelFiles(kept["kind"], weights, kept["config"], card, ""))


def lattice_of(document: dict[str, Any]) -> Lattice:
    """Return the tiles and blocks of a finished mask, from its document."""
    identity, recipe = document["identity"], document["recipe"]
    tile, stride = identity["tile"], identity["tile"] - identity["overlap"]
    rows, cols = (
        Axis(size, tile, stride, identity["divisor"], core, recipe["fixed_tile"])
        for size, core in zip(identity["size"], recipe["block"], strict=True)
    )
    return Lattice(rows, cols)


def _portable(view: View) -> dict[str, Any]:
    """Return a view as plain values, without what its user was allowed to do."""
    kept = {key: value for key, value in asdict(view).items() if key != "allow_remote"}
    return kept | {"mosaic": [without_secrets(name) for name in view.mosaic]}


def view_of(recipe: dict[str, Any]) -> View:
    """Return how the raster was looked at."""
    kept = recipe["view"]
    bands, like = kept["bands"], kept["like"]
    return View(
        **kept | {
            "bands": None if bands is None else tuple(bands),
            "like": like and Grid(**like | {"transform": tuple(like["transform"])}),
            "allow_remote": False,  # a mask from a stranger must not make us use the network
            "mosaic": tuple(kept["mosaic"]),
            "trained_bands": tuple(kept["trained_bands"]),
            "plane": tuple((axis, index) for axis, index in kept["plane"]),
        }
    )  # fmt: skip


def plan_from(document: dict[str, Any], source: Path | None, model: Path | None) -> Plan:
    """Return the plan of a finished mask, from its document.

    Parameters
    ----------
    document : dict
        With `identity` and `recipe`.
    source, model : Path or None
        Where raster and model lie now, if they were moved.

    Raises
    ------
    InputError
        The raster is missing or was changed or renamed, or the model is another one.
    ModelError
        The model is missing, or this machine cannot run it as it was run.
    """
    identity, recipe = document["identity"], document["recipe"]
    path = Path(recipe["input"]) if source is None else source
    if not path.exists():
        raise InputError("the input is not where it was", path, "give it with --input")
    files = _model_of(recipe, model)
    channels = network_shape(files).channels
    made_by = (identity["device"], identity["backend"], identity["precision"])
    batch = identity.get("batch_size")  # of masks that a GPU made
    setup = choose_sizes(files, Wanted((identity["tile"],), channels, *made_by, batch)).setup
    raster = open_raster(path, view_of(recipe)).info
    plan = Plan(
        raster=raster,
        model=files,
        channels=channels,
        setup=setup,
        lattice=lattice_of(document),
        blend=Blend(recipe["blend"]),
        probabilities=identity["probabilities"],
        format=identity["format"],
        zarr_format=identity["zarr_format"],
        chunk=identity["chunk"],
        skip_nodata=recipe["skip_nodata"],
        label=MaskSpec.from_dict(document["spec"]).label,
        area=_area_of(recipe),
        lowered=recipe.get("lowered", False),
    )
    ours = plan.identity()
    keys = [key for key in sorted(identity) if ours.get(key) != identity[key]]
    if keys:
        # An input is known by its files' names too, but the same bytes are the same model.
        how, do = "changed", "put the old one back"
        if "input" in keys:
            how, do = "changed or renamed", "put the old one back, by its old name"
        raise InputError(
            f"what made the mask was {how} since (differs in {', '.join(keys)})",
            path,
            f"{do}, or run predict again with --overwrite",
        )
    return plan
