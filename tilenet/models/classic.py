"""The classic U-Nets of the literature, which segmentation-models-pytorch does not have.

* Ronneberger, Fischer, Brox 2015 (https://arxiv.org/abs/1505.04597): 23 convolutional layers, valid
  convolutions, cropped skips, 572 → 388 pixels; or with same padding, as most people use it.
* The 16 to 256 channel U-Net with dropout that is widely used for the nuclei of 2018.
* Attention gates: Oktay et al. 2018 (https://arxiv.org/abs/1804.03999).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tilenet.models.shapes import classic_margin

__all__ = ["CLASSIC", "ClassicUNet"]

CLASSIC: dict[str, dict[str, Any]] = {
    "classic-unet": {"padding": "same"},
    "classic-unet-valid": {"padding": "valid"},
    "classic-unet-small": {"widths": (16, 32, 64, 128, 256), "dropout": 0.2},
    "classic-unet-upsample": {"up": "upsample"},
    "classic-unet-attention": {"attention": True},
}
"""Names on the command line, and what they mean."""

Padding = Literal["same", "valid"]
Up = Literal["transposed", "upsample"]


def _double(before: int, width: int, padding: Padding, dropout: float, norm: bool) -> nn.Sequential:
    """Return two 3×3 convolutions, each with ReLU; dropout between them."""
    layers: list[nn.Module] = []
    for index, channels in enumerate((before, width)):
        layers.append(nn.Conv2d(channels, width, 3, padding=padding, bias=not norm))
        layers += [nn.BatchNorm2d(width)] if norm else []
        layers.append(nn.ReLU(inplace=True))
        layers += [nn.Dropout(dropout)] if dropout and index == 0 else []
    return nn.Sequential(*layers)


def _crop(skip: Tensor, like: Tensor) -> Tensor:
    """Return the middle of `skip`, as large as `like`."""
    top = (skip.shape[-2] - like.shape[-2]) // 2
    left = (skip.shape[-1] - like.shape[-1]) // 2
    return skip[..., top : top + like.shape[-2], left : left + like.shape[-1]]


class _Up(nn.Module):
    """Twice the size, half the channels."""

    def __init__(self, width: int, kind: Up) -> None:
        super().__init__()
        self.step: nn.Module
        if kind == "transposed":
            self.step = nn.ConvTranspose2d(width, width // 2, 2, stride=2)
        else:
            self.step = nn.Sequential(
                nn.Upsample(scale_factor=2, mode="nearest"),
                nn.Conv2d(width, width // 2, 3, padding=1),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C/2, 2H, 2W)."""
        out: Tensor = self.step(x)
        return out


class LocalGate(nn.Module):
    """Oktay's additive gate: each pixel of a skip is weighted by what the deeper level sees there.

    It looks at one pixel at a time, so the network's context stays local.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = max(1, width // 2)
        self.skip = nn.Conv2d(width, inner, 1, bias=False)
        self.gate = nn.Conv2d(width, inner, 1)
        self.weight = nn.Conv2d(inner, 1, 1)

    def forward(self, skip: Tensor, gate: Tensor) -> Tensor:
        """Weight `skip`, (N, C, H, W), by `gate` of the same shape."""
        weight = self.weight(torch.relu(self.skip(skip) + self.gate(gate))).sigmoid()
        out: Tensor = skip * weight
        return out


class ClassicUNet(nn.Module):
    """A U-Net without a pretrained encoder.

    Parameters
    ----------
    in_channels, classes : int
        Bands in, channels out.
    widths : sequence of int
        Channels per level, top to bottom, each twice the one above.
    padding : {"same", "valid"}
        Valid convolutions see no invented pixel; the answer is smaller than the input.
    up : {"transposed", "upsample"}
        How the size doubles.
    attention : bool
        Whether skips pass attention gates.
    dropout : float
        Between the two convolutions of every level.
    norm : bool
        Batch normalisation, which the papers' networks do not have.
    """

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 1,
        *,
        widths: Sequence[int] = (64, 128, 256, 512, 1024),
        padding: Padding = "same",
        up: Up = "transposed",
        attention: bool = False,
        dropout: float = 0.0,
        norm: bool = False,
    ) -> None:
        super().__init__()
        widths = tuple(widths)
        self.margin = classic_margin(len(widths), padding)
        self.divisor = 1 << (len(widths) - 1)
        self._padding = padding
        inputs = (in_channels, *widths[:-1])
        self.down = nn.ModuleList(
            _double(a, b, padding, dropout, norm) for a, b in zip(inputs, widths, strict=True)
        )
        self.up = nn.ModuleList(_Up(width, up) for width in widths[:0:-1])
        self.gates = nn.ModuleList(LocalGate(w) for w in widths[-2::-1]) if attention else None
        self.merge = nn.ModuleList(
            _double(2 * width, width, padding, dropout, norm) for width in widths[-2::-1]
        )
        self.head = nn.Conv2d(widths[0], classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")  # as in the paper
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised pixels, (N, C, H, W), to logits, (N, K, H, W); smaller if valid."""
        skips = []
        for level, block in enumerate(self.down):
            x = block(nn.functional.max_pool2d(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for level, (up, merge) in enumerate(zip(self.up, self.merge, strict=True)):
            x = up(x)
            skip = skips.pop()
            skip = _crop(skip, x) if self._padding == "valid" else skip
            if self.gates is not None:
                skip = self.gates[level](skip, x)
            x = merge(torch.cat([skip, x], dim=1))
        out: Tensor = self.head(x)
        return out
