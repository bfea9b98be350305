"""What all processes of a run note down: which pictures are made, and which were being made when a process died."""

from __future__ import annotations

from collections import Counter

from engine.bulk.ledger import Row

FAILURES = 1000  # that a summary lists


class Board:
    """Rows of pictures that are finished but not in the ledger yet, and pictures that are being made. A Ray actor.

    A block of keys that is done again, since its process or machine died, finds here what was finished.
    """

    def __init__(self) -> None:
        self._rows: dict[str, Row] = {}
        self._begun: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._failed: list[tuple[str, str]] = []
        self._broken: set[str] = set()
        self._reason = ""

    def known(self, keys: list[str]) -> tuple[dict[str, Row], dict[str, int]]:
        """Rows of those keys that are finished; for the others how many processes died while making them."""
        rows = {key: self._rows[key] for key in keys if key in self._rows}
        died = {key: self._begun[key] for key in keys if key in self._begun}
        self._broken |= died.keys()
        return rows, died

    def begin(self, key: str) -> None:
        """A process begins a picture."""
        self._begun[key] += 1

    def end(self, row: Row) -> None:
        """A picture is finished."""
        key = row["key"]
        self._begun.pop(key, None)
        if key not in self._rows:
            self._counts[row["status"]] += 1
            if row["status"] == "failed" and len(self._failed) < FAILURES:
                self._failed.append((key, row["error"]))
        self._rows[key] = row

    def stop(self, reason: str) -> None:
        """The run cannot go on."""
        self._reason = self._reason or reason

    def reason(self) -> str:
        """Why the run cannot go on, if it cannot."""
        return self._reason

    def counts(self) -> dict[str, int]:
        """Pictures that are "done" and "failed"."""
        return dict(self._counts)

    def failures(self) -> list[tuple[str, str]]:
        """Key and error of the first failures."""
        return self._failed

    def broken(self) -> list[str]:
        """Keys of pictures that a process died over."""
        return sorted(self._broken | self._begun.keys())

    def clear(self) -> None:
        """All rows are in the ledger."""
        self._rows.clear()
