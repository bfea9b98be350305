"""Overlapping tiles, blended smoothly, streamed in bounded memory.

Everything is measured in latent pixels, so that tiles stay aligned with the noise field. Along each axis the tiles have
one length and are spread evenly; their weights rise and fall as a smoothstep inside the overlap, keep away from the
tile's outermost samples (which see padding), and sum to one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Places = list[tuple[int, int]]  # top and left of tiles, in latent pixels


@dataclass(frozen=True)
class Axis:
    """Tiles along one axis.

    Attributes:
        size: what must be covered, in latent pixels.
        tile: length of every tile; it may reach beyond `size` when one tile covers all.
        starts: where the tiles begin, rising.
        overlap: the least overlap of two neighbours.
    """

    size: int
    tile: int
    starts: tuple[int, ...]
    overlap: int

    def weights(self, resolution: int) -> np.ndarray:
        """float32 [tiles, tile * resolution]: each tile's share of each of its samples, `resolution` a latent pixel."""
        length, margin = self.tile * resolution, self.overlap * resolution // 4
        ramp = np.clip((np.arange(length) + 0.5 - margin) / max(self.overlap * resolution - 2 * margin, 1), 0.0, 1.0)
        ramp = ramp * ramp * (3.0 - 2.0 * ramp)
        total = np.zeros((self.starts[-1] + self.tile) * resolution)
        shares = np.ones((len(self.starts), length))
        for i, start in enumerate(self.starts):
            if i > 0:
                shares[i] *= ramp
            if i + 1 < len(self.starts):
                shares[i] *= ramp[::-1]
            total[start * resolution :][:length] += shares[i]
        for i, start in enumerate(self.starts):
            shares[i] /= total[start * resolution :][:length]
        return shares.astype(np.float32)


def cover(size: int, tile: int, overlap: int, multiple: int, *, fixed: bool = False) -> Axis:
    """Cover an axis with tiles.

    Args:
        size: samples to cover, in latent pixels.
        tile: the longest tile allowed (a multiple of `multiple`).
        overlap: the least overlap.
        multiple: tiles start and end at multiples of this.
        fixed: every tile has exactly the length `tile` (a plan of static shape); otherwise as short as will do.

    Raises:
        ValueError: tiles so short that the overlap leaves nothing.
    """
    # In units of `multiple` everything is exact.
    whole, longest, shared = -(-size // multiple), tile // multiple, -(-overlap // multiple)
    if longest < 1:
        raise ValueError(f"a tile must be at least {multiple} latent pixels long; got {tile}")
    if whole <= longest:
        return Axis(size, (longest if fixed else whole) * multiple, (0,), overlap)
    if longest <= shared:
        raise ValueError(f"a tile must be longer than its overlap of {shared * multiple} latent pixels; got {tile}")
    count = -(-(whole - shared) // (longest - shared))
    if not fixed:
        longest = -(-(whole + (count - 1) * shared) // count)
    starts = tuple(i * (whole - longest) // (count - 1) * multiple for i in range(count))
    return Axis(size, longest * multiple, starts, overlap)


def blend(
    rows: Axis,
    columns: Axis,
    channels: int,
    resolution: int,
    run: Callable[[Sequence[Places]], Iterator[np.ndarray]],
    batch: int = 1,
) -> Iterator[tuple[int, np.ndarray]]:
    """Run every tile and yield finished bands, from the top to the bottom.

    Args:
        rows, columns: the tiles.
        channels: C of a tile's result.
        resolution: samples of a result for each latent pixel.
        run: batches of places -> for each batch, in order, float32 [tiles, C, h, w]. All places of a batch are in one
            row. It may work ahead; each result is used before the next one is asked for.
        batch: how many tiles are in a batch at most.

    Yields:
        (first row, float32 [C, rows, W]) in samples, cropped to the axes' sizes.
    """
    down, across = rows.weights(resolution), columns.weights(resolution)
    height, width = rows.size * resolution, columns.size * resolution
    tall, wide = rows.tile * resolution, columns.tile * resolution
    band = np.zeros((channels, tall, (columns.starts[-1] + columns.tile) * resolution), np.float32)
    parts = [(j, columns.starts[j : j + batch]) for j in range(0, len(columns.starts), batch)]
    results = run([[(top, left) for left in lefts] for top in rows.starts for _, lefts in parts])
    for i, top in enumerate(rows.starts):
        for j, lefts in parts:
            for k, tile in enumerate(next(results)):
                weighted = tile * across[j + k] * down[i][:, None]
                band[:, :, lefts[k] * resolution :][:, :, :wide] += weighted
        last = i + 1 == len(rows.starts)
        done = tall if last else (rows.starts[i + 1] - top) * resolution
        first = top * resolution
        yield first, band[:, : min(done, height - first), :width]
        if not last:
            band[:, : tall - done] = band[:, done:].copy()
            band[:, tall - done :] = 0.0
