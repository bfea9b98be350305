"""The noise field: published vectors, the table, windows of one field."""

from statistics import NormalDist

import numpy as np
import pytest

from engine.runtime import noise

ALL = 0xFFFFFFFF


@pytest.mark.parametrize(
    "counter, seed, expected",  # Random123's kat_vectors, philox 4x32 with ten rounds
    [
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ALL, ALL, ALL, ALL), 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_random123s_published_vectors(counter, seed, expected):
    assert [f"{int(w):08x}" for w in noise.philox(counter, seed)] == expected.split()


def test_the_table_holds_the_normals_quantiles():
    normal = NormalDist()
    expected = np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)], np.float32)
    assert np.array_equal(noise.quantile_table(), expected)


def test_a_damaged_table_is_refused(tmp_path, monkeypatch):
    content = bytearray(noise.TABLE_FILE.read_bytes())
    content[1000] ^= 1
    (tmp_path / "table").write_bytes(content)
    monkeypatch.setattr(noise, "TABLE_FILE", tmp_path / "table")
    noise.quantile_table.cache_clear()
    with pytest.raises(RuntimeError, match="damaged"):
        noise.quantile_table()
    noise.quantile_table.cache_clear()


def test_windows_are_cut_from_one_field():
    whole = noise.noise_field(7, 48, (0, 40), (0, 50))
    assert np.array_equal(noise.noise_field(7, 48, (11, 29), (5, 42)), whole[:, 11:29, 5:42])
    assert np.array_equal(noise.noise_field(7, 4, (0, 40), (0, 50)), whole[:4])
    assert not np.array_equal(noise.noise_field(8, 48, (0, 40), (0, 50)), whole)


def test_a_channel_is_the_named_half_of_the_named_word():
    z = noise.noise_field(5, 16, (3, 4), (9, 10))[:, 0, 0]
    for channel in range(16):
        words = noise.philox((9, 3, channel // 8, 0), 5)
        word = int(words[channel % 8 // 2])
        half = word >> 16 if channel % 2 else word & 0xFFFF
        assert z[channel] == noise.quantile_table()[half]


def test_the_field_is_white_and_normal():
    z = noise.noise_field(1, 8, (0, 256), (0, 256)).astype(np.float64)
    n = z.size
    assert abs(z.mean()) < 4 / n**0.5 and abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    for a, b in ((z[:, 1:], z[:, :-1]), (z[:, :, 1:], z[:, :, :-1]), (z[1:], z[:-1])):
        assert abs((a * b).mean()) < 4 / a.size**0.5


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_bad_arguments_are_named(seed):
    with pytest.raises(ValueError, match="seed must be in"):
        noise.noise_field(seed, 4, (0, 4), (0, 4))
    with pytest.raises(ValueError, match="rows must be a range"):
        noise.noise_field(0, 4, (4, 0), (0, 4))
    with pytest.raises(ValueError, match="channels"):
        noise.noise_field(0, 0, (0, 4), (0, 4))
