"""A network ready to be trained on a data set: built, and described for predict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from tilenet.blend import Activation
from tilenet.errors import UsageError
from tilenet.models.card import ModelCard
from tilenet.training.config import TrainConfig
from tilenet.training.intake import Intake
from tilenet.training.losses import auto_class_weights, takes_border, takes_class_weights
from tilenet.training.network import (
    context_of,
    divisor_of,
    margin_of,
    network_config,
    new_network,
)
from tilenet.training.result import draft_card
from tilenet.training.sampling import often_factors

__all__ = ["Work", "prepare_work"]

_FEWEST_STEPS, _MOST_STEPS = 20, 1000


@dataclass(frozen=True)
class Work:
    """What is trained, on what, how.

    Parameters
    ----------
    config : TrainConfig
        With nothing left on "auto" but the loss.
    found : Intake
        The data.
    network : nn.Module
        With its first weights.
    arguments : dict
        Its `config.json`.
    card : ModelCard
        Its `tilenet.json`.
    class_weights : list of float or None
        For the loss.
    """

    config: TrainConfig
    found: Intake
    network: nn.Module
    arguments: dict[str, Any]
    card: ModelCard
    class_weights: list[float] | None

    @property
    def channels(self) -> int:
        """Output channels of the network."""
        return int(self.arguments["classes"])


def _steps(config: TrainConfig, pixels: int) -> int:
    """Return the steps of an epoch: as many windows as cover the training part."""
    windows = pixels / config.tile**2
    return min(_MOST_STEPS, max(_FEWEST_STEPS, round(windows / config.batch_size)))


def _class_weights(config: TrainConfig, found: Intake) -> list[float] | None:
    count = len(found.data.classes)
    if config.class_weights == "auto":
        return auto_class_weights(found.train.class_pixels.tolist())
    if config.class_weights == "none":
        return None
    if len(config.class_weights) != count:
        raise UsageError(
            f"{len(config.class_weights)} weights for {count} classes", "--class-weights",
            "give all",
        )  # fmt: skip
    return list(config.class_weights)


def _check_loss(config: TrainConfig, channels: int, class_weights: list[float] | None) -> None:
    """Raise UsageError where weights are asked for that no term of the loss knows."""
    names = [name for _, name in config.loss_terms(channels)]
    if class_weights is not None and not any(takes_class_weights(n, channels) for n in names):
        raise UsageError(
            "the loss takes no class weights", "--class-weights", "add bce or ce to it"
        )
    if config.border_w0 and not any(takes_border(n) for n in names):
        raise UsageError("the loss takes no border weights", "--border-w0", "add bce to it")


def _activation(config: TrainConfig, classes: int) -> Activation:
    if config.activation == "auto":
        return "sigmoid" if classes == 2 else "softmax"
    if config.activation == "sigmoid" and classes != 2:
        raise UsageError(
            f"sigmoid needs two classes, these are {classes}", "--activation", "use softmax"
        )
    return config.activation


def prepare_work(config: TrainConfig, found: Intake, name: str) -> Work:
    """Build the network for a data set.

    Parameters
    ----------
    config : TrainConfig
        Settled (see `tilenet.training.machine.settle`).
    found : Intake
        The data.
    name : str
        The model's.

    Raises
    ------
    UsageError
        An option does not fit the data or the network.
    ModelError
        The network cannot be built, or its encoder's weights cannot be had.
    """
    if not config.steps:
        config = config.model_copy(update={"steps": _steps(config, found.train.pixels)})
    classes = len(found.data.classes)
    activation = _activation(config, classes)
    class_weights = _class_weights(config, found)
    often_factors([sample.name for sample in found.parts.train], config.often)
    channels = 1 if activation == "sigmoid" else classes
    _check_loss(config, channels, class_weights)
    arguments = network_config(config, found.data.bands, channels)
    network = new_network(config, arguments)
    divisor, margin = divisor_of(network), margin_of(network)
    if config.tile % divisor:
        raise UsageError(
            f"a tile of {config.tile} is no multiple of {divisor}", "--tile",
            f"try {-(-config.tile // divisor) * divisor}",
        )  # fmt: skip
    shape: dict[str, Any] = {"divisor": divisor, "context": context_of(network)}
    if any(margin):
        shape["margin"] = list(margin)
    card = draft_card(config, found.data, found.train, activation, shape, name)
    return Work(config, found, network, arguments, card, class_weights)
