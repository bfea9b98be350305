"""Standard normal noise as a pure function of (seed, channel, row, column), bit-equal in every language.

Philox4x32-10 (Salmon et al., SC 2011; Random123) turns a counter into four 32-bit words; each of their eight 16-bit
halves looks up a normal in a table of 2^16 quantiles, float32, in engine/data. No logarithm and no cosine is
involved, whose last bits differ between libraries. Tiles cut from one field therefore agree, and so do languages.

Counter: (column, row, channel // 8, 0); key: the low and the high word of the seed. Channel c takes half c % 8: the low
half of word 0, its high half, the low half of word 1, and so on.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import numpy as np

TABLE_FILE = Path(__file__).parents[1] / "data" / "normal_quantiles.f32"
# Of its 2^18 little-endian bytes; manifests name it too.
TABLE_SHA256 = "1cfbba1e07e34386a57626f82aeb43e6ed54ba70a3ea6b7d964dc66a841074a8"
GENERATOR = "philox4x32-10"
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


@functools.cache
def quantile_table() -> np.ndarray:
    """table[i] = the normal quantile of (i + 1/2) / 2^16, float32 [65536].

    Raises:
        RuntimeError: the shipped file is missing or damaged.
    """
    content = TABLE_FILE.read_bytes() if TABLE_FILE.is_file() else b""
    if hashlib.sha256(content).hexdigest() != TABLE_SHA256:
        raise RuntimeError(f"{TABLE_FILE}: missing or damaged; install the project again")
    table = np.frombuffer(content, "<f4").astype(np.float32)
    table.flags.writeable = False
    return table


def philox(counter: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], seed: int) -> list[np.ndarray]:
    """Philox4x32 with ten rounds.

    Args:
        counter: four arrays of uint32 that broadcast against each other.
        seed: the 64-bit key.

    Returns:
        Four arrays of uint32 of the broadcast shape.
    """
    c0, c1, c2, c3 = (np.asarray(c, np.uint32) for c in counter)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = _M0 * c0.astype(np.uint64), _M1 * c2.astype(np.uint64)
        high0, high1 = (p0 >> np.uint64(32)).astype(np.uint32), (p1 >> np.uint64(32)).astype(np.uint32)
        c0, c1, c2, c3 = (
            high1 ^ c1 ^ np.uint32(k0),
            p1.astype(np.uint32),
            high0 ^ c3 ^ np.uint32(k1),
            p0.astype(np.uint32),
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return list(np.broadcast_arrays(c0, c1, c2, c3))


def noise_field(seed: int, channels: int, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
    """A window of the endless field of standard normals that a seed names.

    Args:
        seed: 0 <= seed < 2^64.
        channels: C >= 1.
        rows, columns: half-open ranges [first, last) in latent pixels, within [0, 2^32).

    Returns:
        float32 [C, rows, columns].

    Raises:
        ValueError: an argument is outside its range.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2^64); got {seed}")
    if channels < 1:
        raise ValueError(f"channels must be at least 1; got {channels}")
    for name, (first, last) in (("rows", rows), ("columns", columns)):
        if not 0 <= first <= last <= 1 << 32:
            raise ValueError(f"{name} must be a range within [0, 2^32); got ({first}, {last})")
    groups = -(-channels // 8)
    x = np.arange(*columns, dtype=np.uint32)
    y = np.arange(*rows, dtype=np.uint32)[:, None]
    group = np.arange(groups, dtype=np.uint32)[:, None, None]
    words = philox((x, y, group, np.zeros((), np.uint32)), seed)
    halves = np.stack([half for w in words for half in (w & np.uint32(0xFFFF), w >> np.uint32(16))], axis=1)
    return quantile_table()[halves].reshape(groups * 8, len(y), len(x))[:channels]
