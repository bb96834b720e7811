"""Change image and label together, with torchvision's v2 functions; for any number of bands.

A zoomed, turned or bent window is read larger than the tile, so that its corners show real pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from tilenet.training.config import TrainConfig

__all__ = ["Geometry", "apply_geometry", "change_colours", "draw_geometry"]

_CHANCE = 0.5
_BEND_PIXELS = 32.0


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


@dataclass(frozen=True, slots=True)
class Geometry:
    """How one window is cut.

    Parameters
    ----------
    side : int
        Pixels a side to read.
    inner : int
        Pixels a side that remain after turning and bending, before zooming to the tile.
    angle : float
        Degrees.
    turns : int
        Quarter turns.
    mirror : bool
        Left and right change places.
    bend : int
        Seed of the elastic field; -1 is none.
    """

    side: int
    inner: int
    angle: float = 0.0
    turns: int = 0
    mirror: bool = False
    bend: int = -1


def draw_geometry(config: TrainConfig, tile: int, generator: torch.Generator) -> Geometry:
    """Draw how a window is cut, for a network that sees `tile` pixels a side."""
    low, high = (math.log(factor) for factor in config.scale)
    zoom = math.exp(_uniform(low, high, generator))
    inner = max(1, round(tile / zoom))
    angle = _uniform(-config.rotate, config.rotate, generator)
    mirror = config.flip and _uniform(0, 1, generator) < _CHANCE
    turns = int(torch.randint(4, (), generator=generator)) if config.turn else 0
    bend = -1
    if config.elastic and _uniform(0, 1, generator) < _CHANCE:
        bend = int(torch.randint(1 << 30, (), generator=generator))
    radians = math.radians(abs(angle) % 90)
    side = math.ceil(inner * (math.cos(radians) + math.sin(radians)))
    if bend >= 0:
        side += 2 * math.ceil(config.elastic)
    side += (side - inner) % 2
    return Geometry(side, inner, angle, turns, mirror, bend)


def _bend_field(side: int, pixels: float, seed: int) -> Tensor:
    """Return a smooth displacement, (1, side, side, 2), of at most `pixels`, in half sides."""
    generator = torch.Generator().manual_seed(seed)
    knots = max(2, round(side / _BEND_PIXELS) + 1)
    coarse = torch.rand((1, 2, knots, knots), generator=generator) * 2 - 1
    field = torch.nn.functional.interpolate(
        coarse, size=(side, side), mode="bicubic", align_corners=True
    ).clamp(-1, 1)
    return field.permute(0, 2, 3, 1) * (2 * pixels / side)


def apply_geometry(
    image: Tensor, label: Tensor, how: Geometry, tile: int, elastic: float
) -> tuple[Tensor, Tensor]:
    """Cut a window to a tile.

    Parameters
    ----------
    image : Tensor, shape (C, side, side), float32
        Standardised pixels.
    label : Tensor, shape (L, side, side), int32
        Planes that are moved without mixing values.
    how : Geometry
        What was drawn.
    tile : int
        Side of the result.
    elastic : float
        Pixels of bending.
    """
    both = tv_tensors.Image(image), tv_tensors.Mask(label)
    if how.bend >= 0:
        field = _bend_field(how.side, elastic, how.bend)
        both = tuple(F.elastic(t, field) for t in both)
    if how.angle:
        both = tuple(
            F.rotate(t, how.angle, interpolation=v2.InterpolationMode.BILINEAR)
            if isinstance(t, tv_tensors.Image) else F.rotate(t, how.angle)
            for t in both
        )  # fmt: skip
    if how.inner != how.side:
        both = tuple(F.center_crop(t, [how.inner, how.inner]) for t in both)
    if how.inner != tile:
        both = tuple(F.resize(t, [tile, tile], antialias=True) for t in both)
    if how.mirror:
        both = tuple(F.horizontal_flip(t) for t in both)
    image, label = (torch.rot90(t.as_subclass(Tensor), how.turns, (1, 2)) for t in both)
    return image.contiguous(), label.contiguous()


def change_colours(image: Tensor, config: TrainConfig, generator: torch.Generator) -> Tensor:
    """Change gamma, contrast and brightness per band, and saturation; add noise or blur.

    Saturation is how far the bands lie from their mean: 1 takes a picture from grey to twice its
    colour.

    Parameters
    ----------
    image : Tensor, shape (C, H, W), float32
        Standardised pixels: strengths are in standard deviations of the data set.
    config : TrainConfig
        The strengths.
    generator : torch.Generator
        Decides everything.
    """
    bands = (len(image), 1, 1)

    def amount(strength: float, shape: tuple[int, int, int] = bands) -> Tensor:
        # Half of the change is common to all bands, half each band's own.
        common = torch.rand((1, 1, 1), generator=generator) * 2 - 1
        own = torch.rand(shape, generator=generator) * 2 - 1
        return (common + own) / 2 * strength

    if config.gamma:
        low = image.amin((1, 2), keepdim=True)
        span = (image.amax((1, 2), keepdim=True) - low).clamp_min(1e-6)
        image = ((image - low) / span).pow(amount(2 * config.gamma).exp()) * span + low
    if config.contrast:
        centre = image.mean((1, 2), keepdim=True)
        image = (image - centre) * (1 + amount(config.contrast)) + centre
    if config.saturation and len(image) > 1:
        grey = image.mean(0, keepdim=True)
        factor = _uniform(1 - config.saturation, 1 + config.saturation, generator)
        image = (image - grey) * factor + grey
    if config.brightness:
        image = image + amount(config.brightness)
    if config.blur and _uniform(0, 1, generator) < _CHANCE / 2:
        sigma = _uniform(0.1, max(0.1, 2 * config.blur), generator)
        image = F.gaussian_blur(image, [5, 5], [sigma, sigma])
    if config.noise and _uniform(0, 1, generator) < _CHANCE:
        strength = _uniform(0, 2 * config.noise, generator)
        image = image + torch.randn(image.shape, generator=generator) * strength
    return image
