"""Which photos `gdpo.prepare` cuts: those in the folders and files that it was given, with their captions."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from gdpo.photos.folder import captions_of, listing, natural, refuse_pairs


@dataclass(frozen=True)
class Source:
    """A photo to work on: where it is, its name in the manifest (the folder's name and the path below it)."""

    path: Path
    name: str

    @property
    def unit(self) -> str:
        """A short name for files: readable, and unique by a hash of the whole name."""
        stem = "".join(c if (c.isalnum() and c.isascii()) or c in "-_" else "-" for c in self.path.stem)[:40]
        return f"{stem}-{hashlib.blake2b(self.name.encode('utf-8', 'surrogateescape'), digest_size=4).hexdigest()}"


@dataclass
class Sources:
    """What was found.

    Attributes:
        photos: in natural order.
        captions: by the photo's name.
        dangling: names of links that lead nowhere -> why they are skipped.
    """

    photos: list[Source] = field(default_factory=list)
    captions: dict[str, str] = field(default_factory=dict)
    dangling: dict[str, str] = field(default_factory=dict)


def find_sources(photos: list[Path], out: Path) -> Sources:
    """The photos in these folders (links followed) and files.

    Raises:
        ValueError: a path that is not there, two photos of one name, captions of other photos, LR pictures beside HR
            ones, or an output folder inside a folder of photos.
    """
    sources: dict[str, Source] = {}
    found = Sources()
    for given in photos:
        root = given.resolve()
        if root.is_dir():
            if out.resolve().is_relative_to(root) or root.is_relative_to(out.resolve()):
                raise ValueError(f"--out {out} and the folder of photos {given} must not lie inside one another")
            here = listing(root)
            refuse_pairs(given, here.names)
            names = {f"{root.name}/{name}": root / name for name in [*here.names, *here.others]}
            beside, prefix = root / "captions.jsonl", f"{root.name}/"
            found.dangling |= {
                f"{prefix}{name}": f"a link to {target}, which is not there" for name, target in here.dangling.items()
            }
        elif root.is_file():
            names, beside, prefix = {root.name: root}, root.parent / "captions.jsonl", ""
        else:
            raise ValueError(f"{given}: no such file or folder")
        for name, path in names.items():
            if name in sources and not os.path.samefile(sources[name].path, path):
                raise ValueError(f"{sources[name].path} and {path} would both be called {name}; rename a folder")
            sources[name] = Source(path, name)
        if beside.is_file():
            captions = captions_of(beside)
            mine = {n: caption for file, caption in captions.items() if (n := f"{prefix}{file}") in names}
            if captions and not mine and root.is_dir():
                raise ValueError(
                    f"{beside} names {next(iter(captions))} and others, none of which is a photo in {given}; "
                    "its names must be paths below that folder"
                )
            found.captions |= mine
    by_name = sorted(sources.values(), key=lambda s: s.name)
    found.photos = sorted(by_name, key=lambda s: natural(s.name))
    return found
