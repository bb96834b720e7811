"""Which tile and overlap a run has: asked for, settled, or what suits the network."""

from __future__ import annotations

from dataclasses import dataclass

from tilenet.config import PredictConfig
from tilenet.errors import ModelError, UsageError
from tilenet.models.session import NetworkShape
from tilenet.models.store import ModelFiles

__all__ = ["TileChoice", "choose_tile", "smaller_tiles"]

_LOCAL_TILE, _LOCAL_OVERLAP = 1024, 256
_UNKNOWN_TILE, _LEAST_TILE = 512, 256


@dataclass(frozen=True, slots=True)
class TileChoice:
    """Tile and overlap in use.

    Parameters
    ----------
    tile, overlap, divisor : int
        Pixels; tile and stride are multiples of the divisor.
    fixed : bool
        The network takes no other tile.
    """

    tile: int
    overlap: int
    divisor: int
    fixed: bool


def choose_tile(
    files: ModelFiles, shape: NetworkShape, config: PredictConfig, settled: int | None = None
) -> TileChoice:
    """Choose tile and overlap: the flags, else what is settled, the card, the network's context.

    A network without global context runs on tiles larger than those it was trained on: that is
    closer to the whole-image pass, and faster. Sides are rounded up, strides down, to the divisor.

    Parameters
    ----------
    files, shape : ModelFiles, NetworkShape
        The network.
    config : PredictConfig
        What was asked for.
    settled : int or None
        The tile that memory allows, or that a mask which is there has.

    Raises
    ------
    UsageError
        The overlap is more than 75 % of the tile, or the network takes another tile.
    """
    card = files.card
    if shape.fixed is not None:
        height, width = shape.fixed
        if height != width:
            raise ModelError(
                f"takes tiles of {height}×{width} only", files.weights, "export square"
            )
        if config.tile not in (None, height):
            raise UsageError(f"the network takes tiles of {height} only", "--tile", "leave it out")
        tile, divisor = height, 1
    else:
        divisor = files.divisor
        default = card.tile or _UNKNOWN_TILE
        if card.context == "local":
            default = max(default, _LOCAL_TILE)
        tile = -(-(config.tile or settled or default) // divisor) * divisor
    overlap = config.overlap
    if overlap is None:
        same = config.tile is None and tile == card.tile and card.overlap is not None
        overlap = card.overlap if same else tile * _LOCAL_OVERLAP // _LOCAL_TILE
    assert overlap is not None
    if 4 * overlap > 3 * tile:
        raise UsageError(f"overlap {overlap} is over 75 % of tile {tile}", "--overlap", "lower it")
    stride = max(divisor, (tile - overlap) // divisor * divisor)
    return TileChoice(tile, tile - stride, divisor, shape.fixed is not None)


def smaller_tiles(
    choice: TileChoice, context: str | None, config: PredictConfig
) -> tuple[int, ...]:
    """Return the sides of tiles to fall back on where memory is short.

    None if one was asked for, or the network's context is not known to be local: such a network
    keeps the tile that it was trained on.

    Parameters
    ----------
    choice : TileChoice
        What is wanted.
    context : {"local", "global"} or None
        The network's; None if nobody says.
    config : PredictConfig
        What was asked for.
    """
    if choice.fixed or context != "local" or config.tile is not None:
        return ()
    sides = (choice.tile * quarters // 4 for quarters in (3, 2, 1))
    whole = (-(-side // choice.divisor) * choice.divisor for side in sides if side >= _LEAST_TILE)
    overlap = config.overlap or 0
    return tuple(side for side in whole if 4 * overlap <= 3 * side)
