"""What a file, a model or this machine is, as documents to print."""

from __future__ import annotations

import json
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import rasterio

import tilenet
from tilenet.engine.document import read_sidecar
from tilenet.errors import InputError, ModelError
from tilenet.models.card import ModelCard
from tilenet.models.contract import keeps_batch_contract
from tilenet.models.session import choose, cores, cpu_flags, network_shape, open_session
from tilenet.models.store import BUNDLED, ModelFiles, bundled_models, cache_folder, find_model
from tilenet.sinks import documents, open_store, warnings_for
from tilenet.sources import RemoteName, View, is_mask_store, named, open_raster
from tilenet.strangers import exists, is_store, parse_json

__all__ = ["describe", "examine", "list_models"]


def _describe_mask(path: Path) -> dict[str, Any]:
    store = open_store(path)
    spec = store.spec
    kept = documents(path)
    plan = parse_json(kept["plan"]) if "plan" in kept else {}
    readers = ["xarray", "zarr", "ome-zarr", "napari"]
    readers += ["GDAL ≥ 3.10", "QuPath"] if spec.zarr_format == 2 else ["GDAL ≥ 3.12"]
    return {
        "kind": "mask",
        "complete": bool(kept),
        "width": spec.width,
        "height": spec.height,
        "levels": len(spec.levels),
        "zarr_format": spec.zarr_format,
        "classes": {str(c.id): c.name for c in spec.classes},
        "pixels": plan.get("pixels", {}),
        "probabilities": list(spec.channels),
        "crs": spec.georeference.crs_wkt,
        "transform": spec.georeference.transform,
        "mpp": spec.georeference.mpp,
        "opens_in": readers,
        "not_seen": warnings_for(spec),
        "made_by": plan,
    }


def _describe_file(path: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Describe a one-file mask by its header and the document beside it."""
    found = open_raster(path, checked=False).info
    names = plan.get("identity", {}).get("classes", [])
    readers = ["GDAL", "QGIS", "rasterio", "rioxarray"] if found.driver == "GTiff" else ["any"]
    return {
        "kind": "mask",
        "complete": plan.get("size") == path.stat().st_size,
        "width": found.width,
        "height": found.height,
        "levels": len(found.levels),
        "driver": found.driver,
        "classes": {str(k): name for k, name in enumerate(names)},
        "pixels": plan.get("pixels", {}),
        "crs": found.georeference.crs_wkt,
        "transform": found.georeference.transform,
        "mpp": found.georeference.mpp,
        "opens_in": readers,
        "made_by": plan,
    }


def _describe_model(files: ModelFiles) -> dict[str, Any]:
    card: ModelCard = files.card
    shape = network_shape(files)
    return {
        "kind": "model",
        "format": files.kind,
        "architecture": files.config.get("_model_class"),
        "encoder": files.config.get("encoder_name"),
        "channels": shape.channels,
        "fixed_tile": shape.fixed,
        "sha256": files.sha256,
        "size_mb": round(files.weights.stat().st_size / 1e6, 1),
        **card.model_dump(mode="json", by_alias=True),
    }


def _describe_raster(path: Path | RemoteName, view: View | None = None) -> dict[str, Any]:
    found = open_raster(path, view, checked=False).info
    place = found.georeference
    bounds = None
    if place.transform is not None:
        corners = [
            (
                place.transform[0] * x + place.transform[1] * y + place.transform[2],
                place.transform[3] * x + place.transform[4] * y + place.transform[5],
            )
            for x in (0, found.width)
            for y in (0, found.height)
        ]
        xs, ys = zip(*corners, strict=True)
        bounds = [min(xs), min(ys), max(xs), max(ys)]
    fitting = [
        name for name in bundled_models()
        if find_model(name, None, {}).card.band_count == len(found.bands)
    ]  # fmt: skip
    return {
        "kind": "raster",
        "driver": found.driver,
        "width": found.width,
        "height": found.height,
        "bands": found.count,
        "image_bands": list(found.bands),
        "dtype": found.stored_dtype,
        "levels": [list(size) for size in found.levels],
        "native_block": list(found.native_block),
        "nodata": list(found.nodata),
        "validity": found.validity,
        "crs": place.crs_wkt,
        "transform": place.transform,
        "bounds": bounds,
        "gcps": len(place.gcps),
        "mpp": place.mpp,
        "files": list(found.files),
        "models_that_fit": fitting,
    }


def describe(name: Path | str, *, allow_remote: bool = False) -> dict[str, Any]:
    """Return what a raster, a mask or a model is.

    Parameters
    ----------
    name : Path or str
        A URL as str.
    allow_remote : bool
        Whether it may lie on another machine.

    Raises
    ------
    InputError
        None of these.
    """
    path = named(name)
    if isinstance(path, RemoteName):
        return _describe_raster(path, View(allow_remote=allow_remote))
    if not exists(path) and str(path) in bundled_models():
        return _describe_model(find_model(str(path), None, {}))
    if not exists(path):
        raise InputError("no such file or folder", path, "check the path")
    if path.suffix.lower() == ".onnx" or (path / "config.json").is_file():
        return _describe_model(find_model(str(path), None, {}))
    if is_store(path) and not is_mask_store(path):
        return _describe_raster(path)
    if path.is_dir():
        return _describe_mask(path)
    made_by = read_sidecar(path)
    return _describe_raster(path) if made_by is None else _describe_file(path, made_by)


def list_models() -> list[dict[str, Any]]:
    """Return the models that ship with tilenet."""
    found = []
    for name in bundled_models():
        document = json.loads((BUNDLED / name / "tilenet.json").read_bytes())
        size = (BUNDLED / name / "model.safetensors").stat().st_size
        keys = ("name", "description", "license", "bands", "classes", "metrics")
        found.append({k: document.get(k) for k in keys} | {"size_mb": round(size / 1e6, 1)})
    return found


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("torch", "openvino", "segmentation-models-pytorch", "zarr", "dask", "rasterio"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _check_backend(files: ModelFiles, backend: str, precision: str) -> dict[str, Any]:
    try:
        setup = choose(files, device="cpu", backend=backend, precision=precision, batch_size=2)
        session = open_session(files, setup, "uint8")
    except ModelError as error:
        return {"works": False, "why": str(error)}
    kept = keeps_batch_contract(session, files.card, (128, 128))
    return {"works": True, "batch_contract": kept}


def examine() -> dict[str, Any]:
    """Return the state of this machine: versions, devices, backends, formats.

    Every backend forwards a few tiles of the bundled model; ``ok`` is false if one that runs breaks
    the batch contract.
    """
    files = find_model("nuclei", None, {})
    backends = {
        f"{backend} {precision}": _check_backend(files, backend, precision)
        for backend in ("openvino", "torch")
        for precision in ("fp32", "bf16")
    }
    import torch

    with rasterio.Env() as environment:
        drivers = sorted(
            {"GTiff", "COG", "PNG", "JPEG", "JP2OpenJPEG"} & set(environment.drivers())
        )
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "tilenet": tilenet.__version__,
        "python": platform.python_version(),
        "versions": _versions(),
        "gdal": rasterio.__gdal_version__,
        "gdal_formats": drivers,
        "cores": cores(),
        "bf16_in_hardware": bool(cpu_flags() & {"amx_bf16", "avx512_bf16", "bf16"}),
        "cuda": cuda,
        "cache": str(cache_folder()),
        "free_bytes_here": shutil.disk_usage(Path()).free,
        "chosen": choose(files).why,
        "backends": backends,
        "ok": all(b.get("batch_contract", True) for b in backends.values()),
    }
