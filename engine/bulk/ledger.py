"""What became of each key: small parquet files in the output, which Ray Data writes block by block.

A part of the run ends as one file in `ledger/`; until then its rows are in `parts/`, a file a block, so that a killed
run loses no more than the rows of blocks that were under way. A key may have several rows: one that is done counts.
"""

from __future__ import annotations

import hashlib
import io
import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from engine.bulk.storage import Storage

STATE = ".gdpo-bulk"
LEDGER, PARTS, NOTES, RECIPE, CLAIM, SUMMARY = (
    f"{STATE}/{name}" for name in ("ledger", "parts", "notes", "recipe.json", "claim.json", "summary.json")
)
COLUMNS = ("key", "output", "status", "sha256", "size", "seconds", "error")
_AT_ONCE = 32  # small files of a part that are read at a time
Row = dict[str, Any]


def schema() -> Any:
    """Of a ledger: status is "done" or "failed"; sha256 and size are the output's; error is one line."""
    import pyarrow as pa

    kinds = {"size": pa.int64(), "seconds": pa.float64()}
    return pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])


class Ledger:
    """The ledger of one output."""

    def __init__(self, out: Storage):
        self.out = out

    def rows(self) -> dict[str, Row]:
        """The row of each key. For tests and reports: it holds the ledger in memory."""
        found: dict[str, Row] = {}
        for table in self._tables():
            for row in table.to_pylist():
                if found.get(row["key"], {}).get("status") != "done":
                    found[row["key"]] = row
        return found

    def settled(self) -> Settled:
        """Which keys are done, and which failed."""
        done, failed = [np.empty(0, _HASH)], [np.empty(0, _HASH)]
        for table in self._tables(("key", "status")):
            hashes = _hashes(table.column("key").to_pylist())
            is_done = np.array([status == "done" for status in table.column("status").to_pylist()], bool)
            done.append(hashes[is_done])
            failed.append(hashes[~is_done])
        return Settled(np.concatenate(done), np.concatenate(failed))

    def gather(self) -> None:
        """Make one file of the rows of each part, and remove those."""
        import pyarrow as pa
        import pyarrow.parquet

        for folder in self.out.names(PARTS):
            whole = f"{LEDGER}/{folder.rpartition('/')[2]}.parquet"
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                found = list(pool.map(self._table, self.out.names(folder)))
            tables = [table for table in found if table is not None]
            if tables and not self.out.exists(whole):  # else a run was killed while it removed them
                file = io.BytesIO()
                pyarrow.parquet.write_table(pa.concat_tables(tables), file, compression="zstd")
                self.out.write(whole, file.getvalue())
            self.out.remove(folder)

    def new_part(self) -> str:
        """A folder for the rows of a part."""
        return f"{PARTS}/{time.time_ns():020}-{secrets.token_hex(3)}"

    def _tables(self, columns: Sequence[str] = COLUMNS) -> Iterator[Any]:
        names = [*self.out.names(LEDGER), *(name for part in self.out.names(PARTS) for name in self.out.names(part))]
        found = (self._table(name, columns) for name in names)
        yield from (table for table in found if table is not None)

    def _table(self, name: str, columns: Sequence[str] = COLUMNS) -> Any:
        """A file's rows; None of one that a kill left torn: its keys are done again."""
        import pyarrow as pa
        import pyarrow.parquet

        if not name.endswith(".parquet"):
            return None
        wanted = pa.schema([schema().field(name) for name in columns])
        try:
            file = io.BytesIO(self.out.read(name))
            return pyarrow.parquet.read_table(file, columns=list(columns), use_threads=False).cast(wanted)
        except (pa.ArrowInvalid, ValueError):
            return None

    def keep_recipe(self, recipe: Mapping[str, Any]) -> None:
        """Write down the options of the first run into this output."""
        if not self.out.exists(RECIPE):
            self.out.write(RECIPE, json.dumps(recipe, sort_keys=True).encode())

    def check_recipe(self, recipe: Mapping[str, Any]) -> None:
        """Hold every run into this output to the options of the first.

        Raises:
            ValueError: they differ; the message names which.
        """
        if not self.out.exists(RECIPE):
            return
        before, now = json.loads(self.out.read(RECIPE)), json.loads(json.dumps(recipe))
        names = sorted(n for n in {*before, *now} if before.get(n) != now.get(n))
        changed = [f"{name} {json.dumps(before.get(name))} -> {json.dumps(now.get(name))}" for name in names]
        if changed:
            raise ValueError(
                f"{self.out.url}: was begun with other options ({', '.join(changed)}); give those, or another output"
            )


_HASH = "S16"  # 128 bits of a key


def _hashes(keys: list[str]) -> np.ndarray:
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=16).digest() for key in keys)
    return np.frombuffer(digests, _HASH)


class Settled:
    """Which keys are done or failed, in 17 bytes a key.

    Args:
        done, failed: hashes of keys, S16, in any order; a key in both is done.
    """

    def __init__(self, done: np.ndarray, failed: np.ndarray):
        self._hashes, first = np.unique(np.concatenate([done, failed]), return_index=True)
        self._is_done = first < len(done)

    def __len__(self) -> int:
        return len(self._hashes)

    def of(self, keys: list[str]) -> list[str | None]:
        """ "done", "failed" or None for each key."""
        if not len(self):
            return [None] * len(keys)
        wanted = _hashes(keys)
        at = np.minimum(np.searchsorted(self._hashes, wanted), len(self) - 1)
        states = np.where(self._is_done[at], "done", "failed")
        return [str(s) if there else None for s, there in zip(states, self._hashes[at] == wanted)]
