"""What each process has finished, noted before the result takes its name: proof that outlives the process.

Rows reach the ledger some pictures at a time, so a killed run leaves results that have none. A note says which bytes
were made of which, by which version of the program; the recipe of the output says how. A result that fits its note is
not made again. Only where the output is a local folder: other storage cannot append to an object.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from pathlib import Path

from engine.bulk.ledger import NOTES, Row
from engine.bulk.storage import Storage
from engine.io.version import version


class Notes:
    """The notes of one output; each process writes a file of its own and reads all, each byte once."""

    def __init__(self, out: Storage):
        self._folder = Path(out.path(NOTES)) if out.local else None
        self._name = f"{secrets.token_hex(8)}.jsonl"
        self._read: dict[str, tuple[int, int]] = {}  # of each file: its length when last read, and that of whole lines
        self._lines: dict[str, list[bytes]] = {}  # of each key

    def add(self, row: Row, source: str) -> None:
        """Note a result that is about to take its name.

        Args:
            row: of the ledger.
            source: SHA-256 of the picture that it was made of.

        Raises:
            OSError: the note cannot be written.
        """
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"version": version(), "source": source, "row": row})
        with open(self._folder / self._name, "a", encoding="utf-8") as file:  # one write: a kill may tear its end off
            file.write(f"{line}\n")

    def find(self, key: str, sha256: str, source: str) -> Row | None:
        """The row of a result with these bytes, made of a picture with those; None where nothing proves that."""
        if self._folder is None:
            return None
        for file in sorted(self._folder.glob("*.jsonl")):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile: its rows are in the ledger
                self._catch_up(file)
        for line in self._lines.get(key, ()):
            note = json.loads(line)
            row: Row = note["row"]
            if (note.get("version"), note.get("source"), row.get("sha256")) == (version(), source, sha256):
                return row
        return None

    def _catch_up(self, file: Path) -> None:
        """Take the lines that a file has got since it was last read."""
        length, whole = self._read.get(file.name, (0, 0))
        if file.stat().st_size == length:
            return
        with open(file, "rb") as opened:
            opened.seek(whole)
            new = opened.read()
        lines = new[: new.rfind(b"\n") + 1]  # what follows is under way, or torn
        self._read[file.name] = whole + len(new), whole + len(lines)
        for line in lines.splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # torn
                self._lines.setdefault(json.loads(line)["row"]["key"], []).append(line)
