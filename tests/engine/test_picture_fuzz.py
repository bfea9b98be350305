"""Mutated pictures of every format: each is a picture or one typed error, soon and in little memory."""

import random
import time
from collections import Counter

import pytest

from engine.io.images import SUFFIXES, read_image
from tests.support.pictures import check_foreign, installed, mutated, resident, write_seeds

WRITABLE = sorted(suffix for suffix, kind in SUFFIXES.items() if installed(kind))


@pytest.mark.parametrize("count", [250, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_mutated_pictures_are_pictures_or_typed_errors(tmp_path, count, capfd):
    """Also: the header's size is the decoded one, and whatever was read can be written and read again."""
    seeds, rng, path = write_seeds(tmp_path / "seeds"), random.Random(count), tmp_path / "mutant"
    originals = [(seed.suffix, seed.read_bytes()) for seed in seeds]
    for seed in seeds:  # libraries and their tables are in memory
        read_image(seed)
    before, read, refused, slowest = resident(), Counter(), 0, (0.0, "")
    for _ in range(count):
        kind, data = rng.choice(originals)
        path.write_bytes(mutated(data, rng))
        begin = time.process_time()
        found = check_foreign(path, tmp_path / f"out{rng.choice(WRITABLE)}")
        slowest = max(slowest, (time.process_time() - begin, kind))
        if found is None:
            refused += 1
        else:
            read[kind] += 1
    capfd.readouterr()  # libpng and libtiff complain on stderr
    assert read.total() + refused == count and min(read.total(), refused) > count // 20
    assert set(read) == {kind for kind, _ in originals}
    assert slowest[0] <= 2, slowest
    assert resident() - before <= 500
    print(f"{count} mutants: {read.total()} read, {refused} refused, slowest {slowest[0]:.2f} s ({slowest[1]})")
