"""Where a model lies: bundled, a folder, an ONNX file, or a hub. Does not import torch."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tilenet.blend import Activation
from tilenet.durable import temporary
from tilenet.errors import ModelError
from tilenet.models.card import ModelCard, parse_card
from tilenet.strangers import is_file, is_folder, parse_json

__all__ = [
    "BUNDLED",
    "ModelFiles",
    "bundled_models",
    "cache_folder",
    "external_files",
    "find_model",
    "identified",
    "keep",
]

BUNDLED = Path(__file__).parent / "bundled"
DEFAULT_CONVERSION = (
    'convert it in a place you trust: python -c "import torch, safetensors.torch as s; '
    "s.save_file(torch.load('MODEL.pt', weights_only=True), 'model.safetensors')\""
)
_PICKLES = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".tar"}
_MAX_JSON_BYTES = 4 << 20
_MAX_CHANNELS = 4096
_ACTIVATIONS: dict[str, Activation] = {
    "sigmoid": "sigmoid", "softmax2d": "softmax", "softmax": "softmax"
}  # fmt: skip
"""What SMP calls what we can do."""
_LOCATION = re.compile(rb"\x0a\x08location\x12([\x01-\x7f])", re.DOTALL)
"""In protobuf: field 1, 8 bytes, the key; field 2, so many bytes, a name."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk, described but not loaded.

    Parameters
    ----------
    kind : {"smp", "onnx"}
        What the weights belong to.
    weights : Path
        model.safetensors or the ONNX file.
    config : dict
        SMP's own config.json; empty for ONNX.
    card : ModelCard
        The model card.
    sha256 : str
        Hash of weights, config and card: the model's identity.
    """

    kind: Literal["smp", "onnx"]
    weights: Path
    config: dict[str, Any]
    card: ModelCard
    sha256: str

    @property
    def divisor(self) -> int:
        """What tile sides and origins must be multiples of."""
        if self.card.divisor is not None:
            return int(self.card.divisor)
        depth = int(self.config.get("encoder_depth", 5))
        return max(32, 1 << depth)


def cache_folder() -> Path:
    """Return the folder for what can be made again: XDG_CACHE_HOME/tilenet.

    Without a home, one that cannot be written: nothing is kept.
    """
    if said := os.environ.get("XDG_CACHE_HOME"):
        return Path(said) / "tilenet"
    try:
        return Path.home() / ".cache" / "tilenet"
    except RuntimeError:  # a container's user that no table of users knows
        return Path("/nonexistent/tilenet")


def keep(path: Path, *content: bytes | memoryview) -> bool:
    """Write a file of the cache, whole or not at all; return whether it could be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = temporary(path)
        try:
            with temp.open("wb") as file:
                file.writelines(content)
            temp.replace(path)
        finally:
            temp.unlink(missing_ok=True)
    except OSError:  # a cache that is somebody else's, or full
        return False
    return True


def bundled_models() -> list[str]:
    """Return the names of the models that ship with tilenet."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/tilenet.json"))


def _read_json(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelError("the json is too large", path, "give a tilenet.json")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a NUL in the name
        raise ModelError(f"cannot be read: {error}", path, "check the path") from error


def _hash(*parts: Path | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, bytes):
            digest.update(part)
        else:
            with part.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        digest.update(b"\0")
    return digest.hexdigest()


def identified(files: ModelFiles) -> ModelFiles:
    """Return a model with its hash, and its weights by their absolute path."""
    card = files.card.model_dump_json(
        include={"classes", "bands", "value_range", "mean", "std", "activation", "margin"}
    ).encode()
    config = json.dumps(files.config, sort_keys=True).encode()
    weights = files.weights.absolute()  # a worker may stand elsewhere
    others = external_files(weights) if files.kind == "onnx" else []
    return replace(files, weights=weights, sha256=_hash(weights, config, card, *others))


def external_files(weights: Path) -> list[Path]:
    """Return the files beside an ONNX file in which its weights lie, if they do.

    ONNX's `TensorProto.external_data` names them: entries of the keys "location", "offset" …

    Raises
    ------
    ModelError
        One is not there, or elsewhere.
    """
    with weights.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return []
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = {data[m.end() : m.end() + m[1][0]] for m in _LOCATION.finditer(data)}
    paths = []
    for name in sorted(os.fsdecode(one) for one in found):
        if "/" in name or name in (".", ".."):
            raise ModelError(f"its weights lie in {name}", weights, "put them beside it")
        if not weights.with_name(name).is_file():
            raise ModelError(f"its weights in {name} are missing", weights, "put them beside it")
        paths.append(weights.with_name(name))
    return paths


def _check_numbers(config: dict[str, Any], folder: Path) -> None:
    """Raise unless what is used of a config before its network is built is what it must be."""
    for key, most in (("in_channels", _MAX_CHANNELS), ("classes", 255), ("encoder_depth", 7)):
        if key in config and (type(config[key]) is not int or not 1 <= config[key] <= most):
            raise ModelError(
                f"config.json: {key} is {config[key]!r}", folder, f"1 to {most} is possible"
            )
    for key in (key for key in config if key.endswith("channels")):
        widths = config[key] if isinstance(config[key], list) else [config[key]]
        if any(isinstance(width, int) and width > _MAX_CHANNELS for width in widths):
            raise ModelError(
                f"config.json: {key} is {config[key]!r}", folder, f"at most {_MAX_CHANNELS}"
            )


def _with_one_activation(
    card: ModelCard, config: dict[str, Any], text: bytes, overrides: dict[str, Any], folder: Path
) -> tuple[ModelCard, dict[str, Any]]:
    """Return card and config of a network that is activated once: by us, if they agree.

    SMP's own networks may end in an activation too.
    """
    own = config.get("activation")
    if own in (None, "identity"):
        return card, config
    name = _ACTIVATIONS.get(str(own))
    said = "activation" in overrides or "activation" in parse_json(text)
    if name is not None and not said:
        card = card.model_copy(update={"activation": name})
    if card.activation == name:
        return card, config | {"activation": None}
    if card.activation != "none":
        raise ModelError(
            f"the network ends in its own {own}, and is to get {card.activation} on top", folder,
            "set the activation of its tilenet.json to none, or give --activation none",
        )  # fmt: skip
    return card, config


def _from_folder(folder: Path, card_path: Path | None, overrides: dict[str, Any]) -> ModelFiles:
    weights = folder / "model.safetensors"
    if not weights.is_file():
        pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in _PICKLES]
        if pickles:
            raise ModelError(
                f"{pickles[0]} is a pickle, which can run code", folder, DEFAULT_CONVERSION
            )
        raise ModelError("no model.safetensors", folder, "save it with model.save_pretrained()")
    try:
        config = parse_json(_read_json(folder / "config.json"))
    except ValueError as error:
        raise ModelError(f"config.json is not JSON: {error}", folder, "save it again") from error
    if not isinstance(config, dict) or "_model_class" not in config:
        raise ModelError(
            "config.json is not SMP's", folder, "save the model with model.save_pretrained()"
        )
    _check_numbers(config, folder)
    path = card_path or folder / "tilenet.json"
    text = _read_json(path) if card_path or path.is_file() else b"{}"
    if "bands" not in overrides and "in_channels" in config and text == b"{}":
        overrides = overrides | {"bands": config["in_channels"]}
    card = parse_card(text, str(path), overrides)
    card, config = _with_one_activation(card, config, text, overrides, folder)
    if card.band_count != config.get("in_channels", 3):
        raise ModelError(
            f"tilenet.json says {card.band_count} bands, config.json "
            f"{config.get('in_channels', 3)}", folder, "correct one of them",
        )  # fmt: skip
    return identified(ModelFiles("smp", weights, config, card, ""))


def _from_onnx(path: Path, card_path: Path | None, overrides: dict[str, Any]) -> ModelFiles:
    sidecar = card_path or path.with_suffix(".json")
    if card_path or sidecar.is_file():
        text = _read_json(sidecar)
    else:
        from tilenet.models.openvino_graph import onnx_shape

        text, overrides = b"{}", overrides | {"bands": onnx_shape(path).bands}
    return identified(ModelFiles("onnx", path, {}, parse_card(text, str(sidecar), overrides), ""))


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download  # only here does tilenet use the network
    except ImportError as error:
        raise ModelError("no huggingface-hub", name, "pip install huggingface-hub") from error
    repository, _, revision = name.removeprefix("hf://").partition("@")
    try:
        folder = snapshot_download(
            repository, revision=revision or None,
            allow_patterns=["config.json", "model.safetensors", "tilenet.json"],
        )  # fmt: skip
    except Exception as error:
        # The hub's client raises its own, httpx's and the system's errors alike.
        raise ModelError(
            f"the hub did not give it: {error}", name, "check the name and the network"
        ) from error
    return Path(folder)


def find_model(name: str, card: Path | None, overrides: dict[str, Any]) -> ModelFiles:
    """Find a model and read its card.

    Parameters
    ----------
    name : str
        A bundled model's name, a folder, an ``.onnx`` file, or ``hf://org/name[@revision]``.
    card : Path or None
        A `tilenet.json` that beats the model's own.
    overrides : dict
        Card keys from the command line.

    Raises
    ------
    ModelError
        Nothing there, a pickle, a foreign json, or something needed is missing.
    """
    path = Path(name)
    if name.startswith("hf://"):
        return _from_folder(_from_hub(name), card, overrides)
    if is_folder(path):
        return _from_folder(path, card, overrides)
    if is_file(path) and path.suffix.lower() == ".onnx":
        return _from_onnx(path, card, overrides)
    if is_file(path) and path.suffix.lower() in _PICKLES:
        raise ModelError("a pickle, which can run code, is not loaded", path, DEFAULT_CONVERSION)
    if is_file(path):
        raise ModelError("not a model", path, "give a model folder or an .onnx file")
    if name in bundled_models():
        return _from_folder(BUNDLED / name, card, overrides)
    raise ModelError(
        "no such model", name, f"bundled: {', '.join(bundled_models())}; or a folder, an .onnx file"
    )
