"""The model on a whole picture, in overlapping tiles: bands of restored rows, from the top to the bottom."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from engine.runtime.backends import Session
from engine.runtime.color import FULL
from engine.runtime.manifest import Manifest
from engine.runtime.noise import noise_field
from engine.runtime.resample import resize_window
from engine.runtime.tiles import Axis, Places, blend, cover

Band = tuple[int, np.ndarray]  # the first row, and rows [n,W,3]
Progress = Callable[[int, int], None]
Run = Callable[[Sequence[Places]], Iterator[np.ndarray]]
ROWS = 128  # output rows that are worked on at a time


class Restorer:
    """One picture on its way through the model.

    Args:
        manifest, sessions: of a loaded folder.
        rgb: [H,W,3] uint8 or uint16.
        seed: of the noise.
        longest: longest side of a tile, in output pixels.
        batch: tiles handed to a session at once.
        progress: called with (tiles done, tiles in all); what it raises cancels.
    """

    def __init__(
        self,
        manifest: Manifest,
        sessions: Mapping[str, Session],
        rgb: np.ndarray,
        seed: int,
        longest: int,
        batch: int,
        progress: Progress | None = None,
    ):
        self.sessions, self.rgb, self.seed, self.batch, self.progress = sessions, rgb, seed, batch, progress
        self.geometry, self.profile = manifest.geometry, manifest.profile
        unit = self.geometry.factor
        self.size = (rgb.shape[0] * self.geometry.scale, rgb.shape[1] * self.geometry.scale)
        multiple = self.geometry.multiple // unit
        # A short overlap for short tiles: at most a quarter.
        overlap = min(self.geometry.overlap // unit, longest // unit // 4 // multiple * multiple)

        def axis(side: int) -> Axis:
            # At least the profile's least tile: a smaller picture is mirrored until it fills one.
            padded = max(-(-side // unit), self.profile.tile[0] // unit)
            return cover(padded, longest // unit, overlap, multiple, fixed=self.profile.static)

        self.rows, self.columns = axis(self.size[0]), axis(self.size[1])
        self.done, self.total = 0, len(self.rows.starts) * len(self.columns.starts) * len(sessions)

    def bands(self) -> Iterator[Band]:
        """uint16 [n,4W,3], n <= ROWS, colours not aligned yet."""
        if "generator" in self.sessions:
            run = self._stage("generator", "image", self._image, noise=self._noise)
        else:
            latent = self._field(self._stage("encoder", "image", self._image))
            noised = self._stage("unet", "latent", self._cut(latent), noise=self._noise)
            run = self._stage("decoder", "x0", self._cut(self._field(noised)))
        height, width = self.size
        for first, band in blend(self.rows, self.columns, 3, self.geometry.factor, run, self.batch):
            last = min(band.shape[1], height - first)
            for top in range(0, last, ROWS):
                yield first + top, quantise(band[:, top : min(top + ROWS, last), :width]).transpose(1, 2, 0)

    def _image(self, top: int, left: int) -> np.ndarray:
        """The upsampled input of a tile, [3,h,w] in [-1,1]."""
        f = self.geometry.factor
        rows, columns = (top * f, (top + self.rows.tile) * f), (left * f, (left + self.columns.tile) * f)
        full = np.float32(np.iinfo(self.rgb.dtype).max)
        window = resize_window(self.rgb, self.size, rows, columns)
        return np.clip(window * (np.float32(2) / full) - np.float32(1), -1, 1)

    def _noise(self, top: int, left: int) -> np.ndarray:
        rows, columns = (top, top + self.rows.tile), (left, left + self.columns.tile)
        return noise_field(self.seed, self.geometry.channels, rows, columns)

    def _stage(self, name: str, key: str, source: Callable[[int, int], np.ndarray], **more: Callable) -> Run:
        """A graph's results for batches of places, with as many batches under way as its session takes."""
        session, least = self.sessions[name], self.profile.batch[0]

        def run(batches: Sequence[Places]) -> Iterator[np.ndarray]:
            waiting: deque[tuple[Places, Callable[[], np.ndarray]]] = deque()
            for places in batches:
                inputs = {}
                for part, cut in ({key: source} | more).items():
                    tiles = [cut(*place) for place in places]
                    # A row's last tiles may be fewer than the least batch: the last one fills up.
                    inputs[part] = np.stack(tiles + tiles[-1:] * (least - len(tiles)))
                waiting.append((places, session.start(inputs)))
                if len(waiting) == session.at_once:
                    yield self._checked(name, *waiting.popleft())
            while waiting:
                yield self._checked(name, *waiting.popleft())

        return run

    def _field(self, run: Run) -> np.ndarray:
        """Run a stage on every tile and blend the latents into one field, which covers the last tiles' ends too."""
        ends = [axis.starts[-1] + axis.tile for axis in (self.rows, self.columns)]
        rows, columns = (Axis(end, a.tile, a.starts, a.overlap) for end, a in zip(ends, (self.rows, self.columns)))
        field = np.empty((self.geometry.channels, *ends), np.float32)
        for first, band in blend(rows, columns, len(field), 1, run, self.batch):
            field[:, first : first + band.shape[1]] = band
        return field

    def _cut(self, field: np.ndarray) -> Callable[[int, int], np.ndarray]:
        return lambda top, left: field[:, top : top + self.rows.tile, left : left + self.columns.tile]

    def _checked(self, name: str, places: Places, finish: Callable[[], np.ndarray]) -> np.ndarray:
        result = finish()[: len(places)]
        # A sum is finite only if every value is, and costs a tenth of np.isfinite().all(); overflow cannot reach it.
        for tile, (top, left) in zip(result, places):
            if not np.isfinite(np.sum(tile, dtype=np.float64)):
                f = self.geometry.factor
                raise FloatingPointError(
                    f"the {name} gave a value that is not finite in the tile at row {top * f}, column {left * f} "
                    f"({self.rows.tile * f}x{self.columns.tile * f} output pixels); try another precision"
                )
        self.done += len(places)
        if self.progress:
            self.progress(self.done, self.total)
        return result


def quantise(planes: np.ndarray) -> np.ndarray:
    """[-1,1] float32 -> 16 bit, halves rounded up."""
    scaled = (np.clip(planes, -1, 1) + np.float32(1)) * np.float32(FULL / 2) + np.float32(0.5)
    return scaled.astype(np.uint16)
