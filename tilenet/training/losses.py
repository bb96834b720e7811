"""Losses by name, and weighted sums of them. SMP's where it has them, torch's for BCE and CE.

All take logits, (N, K, H, W), and targets, (N, H, W) with 255 = ignore; K = 1 is one sigmoid
channel for two classes, K > 1 is softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilenet.classes import NODATA

__all__ = ["Loss", "auto_class_weights", "takes_border", "takes_class_weights"]


_PER_PIXEL = ("bce", "ce")


def auto_class_weights(pixels: Sequence[int]) -> list[float]:
    """Return weights by the inverse square root of the classes' pixels, mean 1.

    The square root keeps a class of a thousandth of the pixels from ruling the gradient. A class
    without pixels gets the weight of the rarest other one.
    """
    some = [n for n in pixels if n > 0] or [1]
    raw = [(n if n > 0 else min(some)) ** -0.5 for n in pixels]
    mean = sum(raw) / len(raw)
    return [value / mean for value in raw]


def takes_class_weights(name: str, channels: int) -> bool:
    """Return whether class weights change a loss: SMP's regional losses know them for K > 1."""
    return name in _PER_PIXEL or (channels > 1 and name != "lovasz")


def takes_border(name: str) -> bool:
    """Return whether border weights change a loss: those that are sums over pixels."""
    return name in _PER_PIXEL


def _per_pixel(logits: Tensor, target: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return each pixel's cross-entropy and class weight, (N, H, W); 0 where ignored."""
    labelled = target != NODATA
    safe = torch.where(labelled, target, 0)
    if logits.shape[1] == 1:
        loss = F.binary_cross_entropy_with_logits(
            logits[:, 0], safe.to(logits.dtype), reduction="none"
        )
    else:
        loss = F.cross_entropy(logits, safe, reduction="none")
    weight = labelled.to(loss.dtype)
    if weights is not None:
        weight = weight * weights.to(loss.device)[safe]
    return loss * weight, weight


class _Entropy(nn.Module):
    """Cross-entropy, or binary cross-entropy for one channel: Σ w·l / Σ class weights.

    A border weight is added to the class weight in the numerator only, so that a term that is 0
    changes nothing and one that is not counts for more.
    """

    def __init__(self, weights: Tensor | None) -> None:
        super().__init__()
        self._weights = weights

    def forward(self, logits: Tensor, target: Tensor, border: Tensor | None) -> Tensor:
        loss, weight = _per_pixel(logits, target, self._weights)
        if border is not None:
            plain, labelled = _per_pixel(logits, target, None)
            loss = loss + plain * border * labelled
        return loss.sum() / weight.sum().clamp_min(1e-7)


class _Binary(nn.Module):
    """BCE of every class against the rest, for several channels; mean over the classes."""

    def __init__(self, weights: Tensor | None) -> None:
        super().__init__()
        self._weights = weights
        self._single = _Entropy(weights)

    def forward(self, logits: Tensor, target: Tensor, border: Tensor | None) -> Tensor:
        if logits.shape[1] == 1:
            out: Tensor = self._single(logits, target, border)
            return out
        labelled = (target != NODATA).to(logits.dtype)
        safe = torch.where(target != NODATA, target, 0)
        wanted = F.one_hot(safe, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
        loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)
        weight = (
            labelled if self._weights is None else labelled * self._weights.to(loss.device)[safe]
        )
        extra = labelled * border if border is not None else 0.0
        return (loss * (weight + extra)).sum() / weight.sum().clamp_min(1e-7)


class _Region(nn.Module):
    """One of SMP's losses; class weights by its own rule where it has one."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self._loss = loss

    def forward(self, logits: Tensor, target: Tensor, border: Tensor | None) -> Tensor:
        del border
        if not bool((target != NODATA).any()):
            return logits.sum() * 0.0  # some of SMP's losses are NaN without a labelled pixel
        out: Tensor = self._loss(logits, target)
        return out


class _Focal(_Region):
    """SMP's focal loss; its binary mode wants targets of the logits' type."""

    def forward(self, logits: Tensor, target: Tensor, border: Tensor | None) -> Tensor:
        return super().forward(
            logits, target.to(logits.dtype) if logits.shape[1] == 1 else target, border
        )


def _term(name: str, channels: int, weights: list[float] | None) -> nn.Module:
    tensor = None if weights is None else torch.tensor(weights)
    if name == "ce":
        return _Entropy(tensor)
    if name == "bce":
        return _Binary(tensor)
    mode = "binary" if channels == 1 else "multiclass"
    options: dict[str, Any] = {"mode": mode, "ignore_index": NODATA}
    if takes_class_weights(name, channels):
        options["class_weights"] = weights
    if name == "focal":
        return _Focal(smp.losses.FocalLoss(**options))
    if name == "lovasz":
        return _Region(smp.losses.LovaszLoss(**options))
    kind = {
        "dice": smp.losses.DiceLoss,
        "jaccard": smp.losses.JaccardLoss,
        "tversky": smp.losses.TverskyLoss,
    }[name]
    if name == "tversky":
        # Missed pixels cost more than false ones (Salehi et al. 2017).
        options |= {"alpha": 0.3, "beta": 0.7}
    return _Region(kind(**options))


class Loss(nn.Module):
    """A weighted sum of losses.

    Parameters
    ----------
    terms : sequence of (float, str)
        Factor and name: bce, ce, dice, jaccard, focal, tversky or lovasz.
    channels : int
        Of the network.
    class_weights : list of float or None
        Per class; for one channel, of background and foreground.

    Notes
    -----
    The loss is a float32 scalar, whatever the logits' type.
    """

    def __init__(
        self, terms: Sequence[tuple[float, str]], channels: int, class_weights: list[float] | None
    ) -> None:
        super().__init__()
        self._factors = [factor for factor, _ in terms]
        self._terms = nn.ModuleList(_term(name, channels, class_weights) for _, name in terms)

    def forward(self, logits: Tensor, target: Tensor, border: Tensor | None = None) -> Tensor:
        """Return the loss of logits, (N, K, H, W), targets, (N, H, W), weights, (N, H, W)."""
        logits, target = logits.float(), target.long()
        parts = [
            factor * term(logits, target, border)
            for factor, term in zip(self._factors, self._terms, strict=True)
        ]
        return torch.stack(parts).sum()
