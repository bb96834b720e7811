"""Windows of a data set as tensors: read, augmented, standardised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from tilenet.classes import NODATA
from tilenet.geometry import Window, reflect
from tilenet.models.card import ModelCard
from tilenet.training.augmentation import apply_geometry, change_colours, draw_geometry
from tilenet.training.border import border_weights, number_objects
from tilenet.training.config import TrainConfig
from tilenet.training.images import ImageCache
from tilenet.training.samples import Sample
from tilenet.training.sampling import Places

__all__ = ["Item", "TrainWindows", "ValWindows", "WindowReader"]

Item = dict[str, Tensor]
"""`image` (C, T, T) float32, `target` (T, T) uint8 with 255 = ignore, perhaps `weight` (T, T)."""


class WindowReader:
    """Reads standardised pixels and labels of samples.

    Parameters
    ----------
    samples : sequence of Sample
        What windows refer to by number.
    card : ModelCard
        Normalisation.
    """

    def __init__(self, samples: Sequence[Sample], card: ModelCard) -> None:
        self._samples = tuple(samples)
        self._offset = card.offset.astype(np.float32)[:, None, None]
        self._scale = card.scale.astype(np.float32)[:, None, None]
        self._cache = ImageCache(np.asarray(card.offset))

    def read(self, number: int, window: Window) -> tuple[NDArray[Any], NDArray[np.int32]]:
        """Read a window; what lies beyond the sample's extent is reflected into it.

        Returns
        -------
        image : ndarray, shape (C, h, w), float32
            Standardised, 0 where invalid.
        labels : ndarray, shape (2, h, w), int32
            Classes (255 = ignore) and object numbers.
        """
        sample = self._samples[number]
        extent = sample.extent
        rows = reflect(window.row - extent.row, window.row_stop - extent.row, extent.height)
        cols = reflect(window.col - extent.col, window.col_stop - extent.col, extent.width)
        box = Window.from_bounds(
            int(rows.min()), int(cols.min()), int(rows.max()) + 1, int(cols.max()) + 1
        )
        place = Window(box.row + extent.row, box.col + extent.col, box.height, box.width)
        pixels, valid = self._cache.read(sample.image, place)
        labels = np.stack([plane.astype(np.int32) for plane in sample.label.read(place)])
        image = (pixels.astype(np.float32) - self._offset) / self._scale
        if valid is not None:
            image = np.where(valid, image, np.float32(0))
            labels[0][~valid] = NODATA
        index = np.ix_(rows - box.row, cols - box.col)
        return image[:, index[0], index[1]], labels[:, index[0], index[1]]


def _crop(plane: Tensor, margin: tuple[int, int]) -> Tensor:
    before, after = margin
    return plane[..., before : plane.shape[-2] - after, before : plane.shape[-1] - after]


class TrainWindows(Dataset[Item]):
    """Random augmented windows, each a function of the seed and its index alone.

    Results therefore depend neither on the number of loader processes nor on where a resumed run
    starts.

    Parameters
    ----------
    reader : WindowReader
        The training part.
    places : Places
        Where windows are cut.
    config : TrainConfig
        Tile, augmentation, border weights, seed.
    length : int
        How many windows the whole run takes.
    margin : tuple of int
        Pixels that the network sees before and after the tile it answers, on each axis.
    """

    def __init__(
        self,
        reader: WindowReader,
        places: Places,
        config: TrainConfig,
        length: int,
        margin: tuple[int, int] = (0, 0),
    ) -> None:
        self._reader, self._places, self._config = reader, places, config
        self._length, self._margin = length, margin

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Item:
        config = self._config
        rng = np.random.default_rng((config.seed, index))
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        tile = config.tile + sum(self._margin)
        how = draw_geometry(config, tile, generator)
        number, window = self._places.draw(how.side, rng)
        pixels, labels = self._reader.read(number, window)
        image, planes = apply_geometry(
            torch.from_numpy(pixels), torch.from_numpy(labels), how, tile, config.elastic
        )
        image = change_colours(image, config, generator)
        item = {"image": image, "target": _crop(planes[0], self._margin).to(torch.uint8)}
        if config.border_w0:
            classes, objects = (plane.numpy() for plane in planes)
            weight = border_weights(
                number_objects(classes, objects), config.border_w0, config.border_sigma
            )
            item["weight"] = _crop(torch.from_numpy(weight), self._margin)
        return item


class ValWindows(Dataset[Item]):
    """Fixed windows without augmentation; pixels beyond the sample do not count.

    Parameters
    ----------
    reader : WindowReader
        The validation part.
    samples : sequence of Sample
        Likewise.
    windows : sequence of (int, Window)
        A sample's number and what the network *answers* there.
    margin : tuple of int
        Pixels that the network sees around it.
    """

    def __init__(
        self,
        reader: WindowReader,
        samples: Sequence[Sample],
        windows: Sequence[tuple[int, Window]],
        margin: tuple[int, int] = (0, 0),
    ) -> None:
        self._reader, self._samples = reader, tuple(samples)
        self._windows, self._margin = tuple(windows), margin

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Item:
        number, window = self._windows[index]
        before, after = self._margin
        seen = Window(
            window.row - before, window.col - before,
            window.height + before + after, window.width + before + after,
        )  # fmt: skip
        image, labels = self._reader.read(number, seen)
        extent = self._samples[number].extent
        inside = window.intersection(extent)
        target = np.full((window.height, window.width), NODATA, np.uint8)
        target[inside.slices(window.row, window.col)] = labels[0][
            inside.slices(seen.row, seen.col)
        ].astype(np.uint8)
        return {"image": torch.from_numpy(image), "target": torch.from_numpy(target)}
