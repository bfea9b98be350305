"""What a place of pictures is: their names, and how each is read. stores.py opens one; archives.py has two kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from engine.io.images import Picture, read_image
from gdpo.photos.folder import Size, captions_of


class Found(NamedTuple):
    """A picture of a store.

    Attributes:
        name: in the store.
        bytes: of its file.
        size: (width, height), or why it cannot be read.
        place: where the store has it.
        partner: of an HR picture, its LR.
    """

    name: str
    bytes: int
    size: Size
    place: Any = None
    partner: Found | None = None


class Store:
    """Pictures by name; here they are files.

    Attributes:
        where: the folder, or the file that lists them.
        found: the pictures, in order.
        notes: what was left out, a line each.
        sides: whether HR and LR pictures may lie side by side. Where they may not, LR ones were refused.
        identity: what else than names and bytes tells its pictures from others'.
    """

    sides = False
    identity = ""

    def __init__(self, where: Path, found: list[Found], notes: list[str]) -> None:
        self.where, self.found, self.notes = where, found, notes

    def label(self, picture: Found) -> str:
        """What messages call a picture."""
        return str(self.where / picture.name)

    def read(self, picture: Found) -> Picture:
        """Raises ImageError, with the picture's label."""
        return read_image(self.where / picture.name)

    @property
    def captions_at(self) -> Path:
        """Where the captions are."""
        return self.where / "captions.jsonl"

    def captions(self) -> dict[str, str] | None:
        """name -> caption; None where there are none."""
        file = self.captions_at
        if not file.is_file():
            return None
        return captions_of(file)

    def __getstate__(self) -> dict:  # what a worker that is not forked gets; each of its pictures names itself
        return self.__dict__ | {"found": []}
