"""Several sources of pictures in given shares. Which source a sample comes from is a function of its number alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction

from gdpo.photos.dataset import CropDataset


class Mixture:
    """Datasets whose samples are interleaved.

    Of the samples 0 to n - 1 a source of share p has p * n, rounded down or up, spread evenly; it numbers its own
    samples 0, 1, 2, ..., so that each of its pictures comes once in each of its epochs.

    Args:
        parts: the datasets.
        shares: how much of the samples each gives, in relation to the others.
    """

    def __init__(self, parts: Sequence[CropDataset], shares: Sequence[float]) -> None:
        self.parts = list(parts)
        weights = [Fraction(share).limit_denominator(1_000_000) or Fraction(share) for share in shares]
        left = [sum(weights[i:], Fraction()) for i in range(len(weights))]
        self._of_rest = [weight / rest for weight, rest in zip(weights, left)]
        fingerprints = "".join(part.fingerprint for part in self.parts)
        self.fingerprint = hashlib.blake2b(fingerprints.encode(), digest_size=16).hexdigest()
        self.notes = [note for part in self.parts for note in part.notes]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def captions(self) -> list[str] | None:
        """Of all pictures; None where any source lacks them."""
        found = [part.captions for part in self.parts]
        return None if any(c is None for c in found) else [line for c in found for line in c or ()]

    def part_of(self, sample: int) -> tuple[CropDataset, int]:
        """The source of a sample, and the sample's number there."""
        number = sample
        for part, share in zip(self.parts, self._of_rest):
            before = number * share.numerator // share.denominator
            if (number + 1) * share.numerator // share.denominator > before:
                return part, before
            number -= before
        raise AssertionError("the last share of what is left is 1")


class HeldOut:
    """The val splits of several datasets, one after the other: what the sheets show."""

    def __init__(self, parts: Sequence[CropDataset]) -> None:
        self.parts = list(parts)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def part_of(self, sample: int) -> tuple[CropDataset, int]:
        """As `Mixture.part_of`."""
        for part in self.parts:
            if sample < len(part):
                return part, sample
            sample -= len(part)
        raise IndexError(sample)

    def spread(self, count: int) -> list[int]:
        """At most `count` samples: as many of each dataset as of the others, spread over it."""
        chosen: list[int] = []
        first = 0
        for number, part in enumerate(self.parts):
            mine = min(len(part), count // len(self.parts) + (number < count % len(self.parts)))
            chosen += [first + i * len(part) // mine for i in range(mine)]
            first += len(part)
        return chosen
