"""Crops of the photos that scikit-image brings."""

from __future__ import annotations

import numpy as np
import torch
from skimage import data


def crops(count: int, size: int) -> torch.Tensor:
    """[count,3,size,size] from photos, reflected at the border where they are smaller."""
    photos = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    found = []
    for number in range(count):
        photo = photos[number % len(photos)]
        below, right = (max(0, size - side) for side in photo.shape[:2])
        photo = np.pad(photo, ((0, below), (0, right), (0, 0)), mode="reflect")
        y, x = ((side - size) * number // count for side in photo.shape[:2])
        found.append(photo[y : y + size, x : x + size])
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous() / 255
