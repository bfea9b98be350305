"""The records of `gdpo.prepare`: what was cut from a photo, a JSON file each."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec


class _Crop(msgspec.Struct):
    """A crop in a record."""

    file: str
    y: int
    x: int
    texture: float
    sha256: str
    bytes: int
    hash: int


class _Record(msgspec.Struct):
    """What a photo's record must have; one that was damaged is made again."""

    source: str
    bytes: int
    mtime_ns: int
    skipped: str | None
    broken: bool
    crops: list[_Crop]
    sha256: str = ""
    hash: int | None = None
    converted: list[str] | None = None


def read_record(file: Path) -> dict | None:
    """A photo's record, or None where there is none or it is damaged."""
    try:
        content = file.read_bytes()
        record = msgspec.json.decode(content, type=_Record)
    except (OSError, msgspec.MsgspecError, UnicodeError):
        return None
    whole = not record.crops or (record.sha256 and record.hash is not None)
    return json.loads(content) if whole else None
