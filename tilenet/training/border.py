"""The U-Net paper's border weight: pixels between two close objects count more.

``w(x) = w0 · exp(−(d1(x) + d2(x))² / (2σ²))``, d1 and d2 the distances to the nearest and the
second nearest object (Ronneberger et al. 2015, equation 2), added to the class weight; 0 inside
objects, as in the authors' own maps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["border_weights", "number_objects"]

_REACH = 6.0  # standard deviations: beyond, exp(−18) of w0 is left


def number_objects(classes: NDArray[np.int32], objects: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the objects' numbers, or those of connected foreground where a label has none.

    Parameters
    ----------
    classes, objects : ndarray, shape (h, w), int32
        As a label gives them.
    """
    if objects.any():
        return objects
    numbered: NDArray[np.int32] = ndimage.label((classes > 0) & (classes < 255))[0]
    return numbered


def border_weights(objects: NDArray[np.int32], w0: float, sigma: float) -> NDArray[np.float32]:
    """Return the border term of the weight map.

    Parameters
    ----------
    objects : ndarray, shape (h, w), int32
        Object numbers, 0 = background.
    w0, sigma : float
        Height of the term; its reach in pixels.

    Returns
    -------
    ndarray, shape (h, w), float32
        0 to `w0`.
    """
    shape = objects.shape
    far = np.float32(_REACH * sigma)
    first = np.full(shape, far, np.float32)
    second = np.full(shape, far, np.float32)
    reach = int(np.ceil(far))
    # find_objects gives a box per number up to the largest: renumber from 1.
    numbers, dense = np.unique(objects, return_inverse=True)
    dense = dense.reshape(shape) + (0 if numbers[0] == 0 else 1)
    for number, box in enumerate(ndimage.find_objects(dense), 1):
        near = tuple(
            slice(max(0, side.start - reach), min(size, side.stop + reach))
            for side, size in zip(box, shape, strict=True)
        )
        distance = ndimage.distance_transform_edt(dense[near] != number).astype(np.float32)
        a, b = first[near], second[near]
        second[near] = np.minimum(b, np.maximum(a, distance))
        first[near] = np.minimum(a, distance)
    term = w0 * np.exp(-((first + second) ** 2) / (2 * sigma * sigma))
    return np.where((objects == 0) & (second < far), term, 0).astype(np.float32)
