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
from tilenet.description import (
    describe_file,
    describe_item,
    describe_raster,
    describe_store,
)
from tilenet.engine.document import read_sidecar
from tilenet.errors import InputError, ModelError
from tilenet.memory import memory_limit
from tilenet.models.card import ModelCard
from tilenet.models.contract import keeps_batch_contract
from tilenet.models.devices import cores, cpu_precisions
from tilenet.models.session import choose, network_shape, open_session
from tilenet.models.store import BUNDLED, ModelFiles, bundled_models, cache_folder, find_model
from tilenet.sources import RemoteName, View, given, is_mask_store
from tilenet.sources.remote import require_permission
from tilenet.sources.stac import is_item
from tilenet.strangers import exists, is_store

__all__ = ["describe", "examine", "list_models"]

_CHECKED = (
    *((backend, precision) for backend in ("openvino", "torch") for precision in ("fp32", "bf16")),
    ("inductor", "fp32"),  # which compiles for half a minute, the first time
)


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
    path, view = given(name), View(allow_remote=allow_remote)
    if isinstance(path, RemoteName):
        require_permission(path, allow_remote)
        return describe_item(path.url) if is_item(path.url) else describe_raster(path, view)
    if not exists(path) and str(path) in bundled_models():
        return _describe_model(find_model(str(path), None, {}))
    if not exists(path):
        raise InputError("no such file or folder", path, "check the path")
    if path.suffix.lower() == ".onnx" or (path / "config.json").is_file():
        return _describe_model(find_model(str(path), None, {}))
    if is_store(path) and not is_mask_store(path):
        return describe_raster(path)
    if path.is_dir():
        return describe_store(path)
    if is_item(str(path)):
        return describe_item(str(path))
    made_by = read_sidecar(path)
    return describe_raster(path, view) if made_by is None else describe_file(path, made_by)


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
        kept = keeps_batch_contract(session, files.card, (128, 128))
    except ModelError as error:
        return {"works": False, "why": str(error)}
    return {"works": True, "batch_contract": kept}


def examine() -> dict[str, Any]:
    """Return the state of this machine: versions, devices, backends, formats.

    Every backend forwards a few tiles of the bundled model; ``ok`` is false if one that runs breaks
    the batch contract.
    """
    files = find_model("nuclei", None, {})
    backends = {
        f"{backend} {precision}": _check_backend(files, backend, precision)
        for backend, precision in _CHECKED
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
        "memory_bytes": memory_limit(),
        "bf16_in_hardware": "bf16" in cpu_precisions(),
        "cuda": cuda,
        "cache": str(cache_folder()),
        "free_bytes_here": shutil.disk_usage(Path()).free,
        "chosen": choose(files).why,
        "backends": backends,
        "ok": all(b.get("batch_contract", True) for b in backends.values()),
    }
