"""`python -m gdpo.prepare PHOTOS... --out DIR`: from folders of photos to HR crops for training.

DIR ends up with train/ and val/ (PNG crops, split by photo), manifest.jsonl (a line for each crop), summary.json,
sheet.png (look at it), and captions.jsonl where the photos have one. Each photo is a unit of work that is recorded
when it is done, so an interrupted run resumes where it stopped and ends with the same bytes as an uninterrupted one;
a finished run, run again, changes nothing; new photos in the folders are added.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, get_type_hints

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from engine.io.cli import Parser, run
from engine.io.files import atomic_write, naming, sha256
from engine.io.images import READABLE, ImageError, read_image
from engine.io.sink import atomic_file
from gdpo.model.parts import read_json
from gdpo.photos.crops import convert, cut, difference_hash, near_duplicates
from gdpo.photos.dataset import SPLITS
from gdpo.photos.records import read_record
from gdpo.photos.sources import Source, Sources, find_sources

_WORK = ".work"  # under the output folder: a record for each photo, and crops that have not found their split yet

_WRITTEN = ("manifest", "summary", "captions", "sheet")  # files beside train/ and val/


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """What determines the crops. A folder made with some settings is not continued with others."""

    size: int = _option(256, "side of the square crops")
    stride: int = _option(128, "largest distance from one crop to the next, in pixels")
    halve: bool | int = _option(
        True,
        "halve photos by area averaging before cutting, which removes traces of JPEG and the sensor: true (once), "
        "false, or how many times (0 to 4)",
    )
    min_texture: float = _option(0.3, "smallest share of textured area in a crop (by the paper's complexity map)")
    dedupe: int = _option(
        3,
        "most bits in which the 64-bit dHashes of near-duplicates differ; of near-duplicate crops or photos only the "
        "first is kept (-1: keep all)",
    )
    val_fraction: float = _option(0.1, "share of the photos to hold out; at least one photo unless it is 0")

    def validate(self) -> None:
        checks = [
            ("size", self.size >= 16, "at least 16"),
            ("stride", self.stride >= 1, "at least 1"),
            ("halve", 0 <= int(self.halve) <= 4, "true, false or 0 to 4"),
            ("min_texture", 0 <= self.min_texture <= 1, "between 0 and 1"),
            ("dedupe", -1 <= self.dedupe <= 63, "-1 to 63"),
            ("val_fraction", 0 <= self.val_fraction < 1, "at least 0 and less than 1"),
        ]
        for name, good, expected in checks:
            if not good:
                raise ValueError(f"{name} must be {expected}; got {getattr(self, name)}")


def process(source: Source, settings: Settings, work: Path) -> None:
    """Cut one photo: crops into work/UNIT/, then the record work/UNIT.json, which says that they are there."""
    status = source.path.stat()
    record: dict[str, Any] = {"source": source.name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    record |= {"skipped": None, "broken": False, "crops": []}
    folder = work / source.unit
    shutil.rmtree(folder, ignore_errors=True)
    try:
        record["sha256"] = sha256(source.path)
        picture = read_image(source.path)
        photo = convert(picture, int(settings.halve))
    except (ImageError, OSError) as error:
        record |= {"skipped": str(error).removeprefix(f"{source.path}: "), "broken": True}
    else:
        height, width = picture.pixels.shape[:2]
        record |= {"size": [width, height], "converted": photo.converted, "hash": difference_hash(photo.pixels)}
        crops, seen = cut(photo, settings.size, settings.stride, settings.min_texture)
        if not seen:
            halved = f", halved to {photo.pixels.shape[1]}x{photo.pixels.shape[0]}," if settings.halve else ""
            record["skipped"] = f"{width}x{height}{halved} is too small for crops of {settings.size}"
        elif not crops:
            record["skipped"] = f"none of its {seen} crops has {settings.min_texture:.0%} of textured area"
        folder.mkdir()
        for crop in crops:
            file = folder / f"{source.unit}-{crop.y:05d}-{crop.x:05d}.png"
            with naming(file):
                Image.fromarray(crop.pixels).save(file, compress_level=3)
            row = {"file": file.name, "y": crop.y, "x": crop.x, "texture": crop.texture}
            row |= {"sha256": hashlib.sha256(crop.pixels.tobytes()).hexdigest(), "bytes": file.stat().st_size}
            record["crops"].append(row | {"hash": difference_hash(crop.pixels)})
    atomic_write(work / f"{source.unit}.json", json.dumps(record))


def _start_worker() -> None:
    """A worker computes on one core, leaves Ctrl-C to its parent, and does not outlive it."""
    torch.set_num_threads(1)
    os.setsid()
    parent = parent_process()
    assert parent is not None
    Thread(target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def process_all(todo: list[Source], settings: Settings, work: Path, workers: int, progress: bool = True) -> None:
    """Process photos with a progress bar; an interrupt waits for the photos in hand."""
    with tqdm(total=len(todo), unit="photo", file=sys.stderr, disable=not (todo and progress)) as bar:
        if workers <= 1:
            for source in todo:
                process(source, settings, work)
                bar.update()
            return
        pool = ProcessPoolExecutor(min(workers, len(todo)) or 1, get_context("spawn"), _start_worker)
        try:
            for future in as_completed([pool.submit(process, source, settings, work) for source in todo]):
                future.result()
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)


# Crops to keep by unit, photos left out as near-duplicates of another photo, units held out.
Selection = tuple[dict[str, list[dict]], dict[str, str], set[str]]


class Folder:
    """The output folder: records of what has been done, and the step from records to the finished folder."""

    def __init__(self, root: Path, settings: Settings) -> None:
        self.root, self.work, self.settings = root, root / _WORK, settings

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make or open the folder for this process alone.

        Raises:
            ValueError: it holds something else, was made with other settings, or is being written.
        """
        mine = self.work / "settings.json"
        if self.root.exists() and not (self.root.is_dir() and (self.work.is_dir() or not any(self.root.iterdir()))):
            raise ValueError(f"{self.root} holds something else; choose a new or empty folder for --out")
        self.work.mkdir(parents=True, exist_ok=True)
        with open(self.work / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another gdpo.prepare is writing {self.root}; wait for it") from None
            for folder, names in ((self.work, ".*"), *((self.root, f".{n}-*") for n in _WRITTEN)):
                for stray in folder.glob(names):  # what a killed run was writing
                    stray.unlink()
            ours = asdict(self.settings)
            if not mine.exists():
                atomic_write(mine, json.dumps(ours))
            try:
                before = read_json(mine)
            except ValueError as error:
                raise ValueError(
                    f"{error}: with which settings {self.root} was made is lost; use another --out"
                ) from None
            changed = [f"{k} {before.get(k)} (now {ours.get(k)})" for k in ours if before.get(k) != ours.get(k)]
            if changed:
                raise ValueError(f"{self.root} was made with {', '.join(changed)}; use these, or another --out")
            yield

    def record(self, source: Source) -> dict | None:
        """What is known about a photo, or None where it must be (re)done: new, changed, or a crop of it is damaged."""
        record, status = read_record(self.work / f"{source.unit}.json"), source.path.stat()
        same = record and (record["bytes"], record["mtime_ns"]) == (status.st_size, status.st_mtime_ns)
        return record if same else None

    def where(self, unit: str, crop: dict) -> Path | None:
        """Where a crop is. Crops are not fsynced one by one: after a power failure their size gives them away."""
        for folder in (*(self.root / split for split in SPLITS), self.work / unit):
            file = folder / crop["file"]
            if file.is_file() and file.stat().st_size == crop["bytes"]:
                return file
        return None

    def lost(self, records: dict[str, dict], kept: dict[str, list[dict]]) -> set[str]:
        """Units of which a selected crop is lost: by hand, by a crash, or as a near-duplicate of what has changed."""
        return {unit for unit, crops in kept.items() if not all(self.where(unit, crop) for crop in crops)}

    def state(self, found: Sources) -> str:
        """A hash of all that the finished folder depends on: photos, captions, settings, and what lies in it."""
        digest = hashlib.blake2b(digest_size=16)
        facts: list[Any] = [found.captions, found.dangling, asdict(self.settings)]
        for source in found.photos:
            status = source.path.stat()
            facts.append([source.name, status.st_size, status.st_mtime_ns])
        for folder in (self.root, *(self.root / split for split in SPLITS)):
            with os.scandir(folder) as entries:
                files = sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in entries if e.is_file())
            facts.append([folder.name, files])
        for part in facts:
            digest.update(json.dumps(part, sort_keys=True).encode())
        return digest.hexdigest()

    def finished(self, found: Sources) -> dict | None:
        """The summary of the last run where nothing has changed since, else None."""
        try:
            if (self.work / "finished").read_text() == self.state(found):
                return json.loads((self.root / "summary.json").read_text())
        except (OSError, ValueError):
            pass
        return None

    def check_strangers(self, sources: list[Source]) -> None:
        """Refuse to go on without photos that were here before: their crops would have to be deleted."""
        units = {source.unit for source in sources}
        for file in sorted(self.work.glob("*.json")):
            if file.stem in units or file.name == "settings.json":
                continue
            stranger = read_record(file)
            if stranger is None:
                raise ValueError(f"{file} is damaged, and of a photo that is not among these; use another --out")
            if stranger["crops"]:
                raise ValueError(
                    f"{self.root} holds crops of photos that are not among these, such as {stranger['source']}; "
                    "name all folders of photos again, or use another --out"
                )
            file.unlink()  # it was skipped, and the user has taken it away

    def select(self, records: dict[str, dict]) -> Selection:
        """What of all that was cut goes into train/ and val/."""
        usable = [unit for unit, record in records.items() if record["crops"]]
        twins = near_duplicates([records[unit]["hash"] for unit in usable], self.settings.dedupe)
        same = {unit: usable[twin] for unit, twin in zip(usable, twins) if twin >= 0}
        units = [unit for unit in usable if unit not in same]
        crops = [(unit, crop) for unit in units for crop in records[unit]["crops"]]
        fresh = near_duplicates([crop["hash"] for _, crop in crops], self.settings.dedupe)
        kept: dict[str, list[dict]] = {unit: [] for unit in units}
        for (unit, crop), twin in zip(crops, fresh):
            if twin < 0:
                kept[unit].append(crop)
        kept = {unit: found for unit, found in kept.items() if found}
        # Held out are the photos with the smallest hashes: which they are depends on their bytes alone.
        held = round(self.settings.val_fraction * len(kept)) or int(self.settings.val_fraction > 0 and len(kept) > 1)
        order = sorted(kept, key=lambda unit: (records[unit]["sha256"], unit))
        return kept, same, set(order[:held])

    def finish(self, found: Sources, records: dict[str, dict], selected: Selection) -> dict:
        """Move the selected crops into train/ and val/, and write manifest, captions, summary and sheet."""
        captions, (kept, same, held_out) = found.captions, selected
        manifest, places = [], []
        for split in SPLITS:
            for unit, crops in kept.items():
                if (unit in held_out) != (split == "val"):
                    continue
                record = records[unit]
                for crop in crops:
                    row = {"file": f"{split}/{crop['file']}", "size": self.settings.size, "source": record["source"]}
                    row |= {"x": crop["x"], "y": crop["y"], "scale": 0.5 ** int(self.settings.halve)}
                    row |= {"texture": crop["texture"], "sha256": crop["sha256"], "source_sha256": record["sha256"]}
                    manifest.append(row)
                    places.append((self.where(unit, crop), self.root / row["file"]))
        changed = self._place(places, _jsonl(manifest))
        texts = [{"file": row["file"], "caption": captions.get(row["source"], "")} for row in manifest]
        if captions:
            _update(self.root / "captions.jsonl", _jsonl(texts))
        names = {unit: record["source"] for unit, record in records.items()}
        summary = {
            "photos": {"found": len(found.photos) + len(found.dangling), "used": len(kept), "val": len(held_out)},
            "crops": {split: sum(row["file"].startswith(f"{split}/") for row in manifest) for split in SPLITS},
            "near_duplicate_crops": sum(len(records[u]["crops"]) for u in records.keys() - same.keys()) - len(manifest),
            "settings": asdict(self.settings),
            "converted": {r["source"]: r["converted"] for r in records.values() if r.get("converted")},
            "near_duplicate_photos": {names[unit]: names[twin] for unit, twin in same.items()},
            "skipped": {r["source"]: r["skipped"] for r in records.values() if r["skipped"]} | found.dangling,
            "broken": [*(r["source"] for r in records.values() if r["broken"]), *found.dangling],
            "without_caption": [names[unit] for unit in kept if captions and names[unit] not in captions],
        }
        _update(self.root / "summary.json", json.dumps(summary, indent=2) + "\n")
        if manifest and (changed or not (self.root / "sheet.png").exists()):
            _sheet(self.root, manifest)
        _update(self.root / "manifest.jsonl", _jsonl(manifest))  # last: it says that all is there
        _update(self.work / "finished", self.state(found))
        return summary

    def _place(self, places: list[tuple[Path | None, Path]], manifest: str) -> bool:
        """Put every selected crop into its place and take away all others; False if nothing was to be done."""
        wanted = {target for _, target in places}
        for split in SPLITS:
            (self.root / split).mkdir(exist_ok=True)
        unwanted = [f for split in SPLITS for f in (self.root / split).iterdir() if f not in wanted]
        moves = [(source, target) for source, target in places if source != target]
        path = self.root / "manifest.jsonl"
        changed = bool(moves or unwanted) or not _holds(path, manifest)
        if changed:
            path.unlink(missing_ok=True)  # while crops move, no manifest is better than a wrong one
        for source, target in moves:
            assert source is not None, "todo() has seen to it"
            os.replace(source, target)
        for file in unwanted:
            file.unlink()
        for folder in self.work.iterdir():
            if folder.is_dir():
                shutil.rmtree(folder)
        return changed


def _update(path: Path, text: str) -> None:
    if not _holds(path, text):
        atomic_write(path, text)


def _holds(path: Path, text: str) -> bool:
    with naming(path):
        return path.exists() and path.read_text() == text


def _jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _sheet(root: Path, manifest: list[dict], columns: int = 10, rows: int = 8, side: int = 128) -> None:
    """A picture of crops taken evenly from the whole manifest; held-out ones have a red frame."""
    picks = [manifest[i] for i in sorted({*np.linspace(0, len(manifest) - 1, columns * rows).astype(int).tolist()})]
    step = side + 4
    sheet = Image.new("RGB", (min(columns, len(picks)) * step, -(-len(picks) // columns) * step), "white")
    for i, row in enumerate(picks):
        corner = (i % columns * step, i // columns * step)
        if row["file"].startswith("val/"):
            sheet.paste("red", (*corner, corner[0] + step, corner[1] + step))
        with Image.open(root / row["file"]) as crop:
            sheet.paste(crop.resize((side, side), Image.Resampling.BOX), (corner[0] + 2, corner[1] + 2))
    with atomic_file(root / "sheet.png") as file:
        sheet.save(file, "PNG")


def prepare(photos: list[Path], out: Path, settings: Settings, workers: int = 1, progress: bool = True) -> dict:
    """What the command does; returns the summary.

    Raises:
        ValueError: bad arguments, or no photo gave a crop.
        OSError: the disk is full or failed.
    """
    settings.validate()
    if workers < 1:
        raise ValueError(f"workers must be at least 1; got {workers}")
    found = find_sources(photos, out)
    if not found.photos:
        raise ValueError(f"no pictures ({' '.join(sorted(READABLE))}) in {', '.join(map(str, photos))}")
    folder = Folder(out, settings)
    with folder.locked():
        folder.check_strangers(found.photos)
        if summary := folder.finished(found):
            return summary
        records = {source.unit: folder.record(source) for source in found.photos}
        todo = [source for source in found.photos if records[source.unit] is None]
        made: set[str] = set()
        while True:
            for source in todo:
                if source.unit in made and read_record(folder.work / f"{source.unit}.json") is None:
                    raise OSError(errno.EIO, "what was written there cannot be read back", str(folder.work))
                made.add(source.unit)
            process_all(todo, settings, folder.work, workers, progress)
            records |= {source.unit: folder.record(source) for source in todo}
            whole = {unit: record for unit, record in records.items() if record}
            selected = folder.select(whole)
            lost = folder.lost(whole, selected[0])
            todo = [source for source in found.photos if records[source.unit] is None or source.unit in lost]
            if not todo:
                return folder.finish(found, whole, selected)


def main() -> int:
    parser = Parser(prog="python -m gdpo.prepare", description="Cut folders of photos into HR crops for training.")
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTOS", help="folders of photos, or single photos")
    parser.add_argument("--out", type=Path, required=True, help="output folder; an unfinished run is continued")
    parser.add_argument("--workers", type=int, default=1, help="number of processes")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    types = get_type_hints(Settings)
    for option in fields(Settings):
        names = sorted({f"--{option.name.replace('_', '-')}", f"--{option.name}"})  # the dash first
        parser.add_argument(*names, type=types[option.name], default=option.default, help=option.metadata["help"])
    options = vars(parser.parse_args())
    photos, out, workers, quiet = (options.pop(name) for name in ("photos", "out", "workers", "no_progress"))
    summary = prepare(photos, out, Settings(**options), workers, progress=not quiet)
    report(summary)
    if not sum(summary["crops"].values()):
        raise ValueError(f"none of {summary['photos']['found']} photo(s) gave a crop; the reasons are above")
    print(f"{out}: {summary['crops']['train']} crops for training, {summary['crops']['val']} held out; see sheet.png")
    return 1 if summary["broken"] else 0


def report(summary: dict) -> None:
    """On stderr: what was left out or changed, by name."""
    lines = [f"skipped {name}: {reason}" for name, reason in summary["skipped"].items()]
    lines += [f"left out {a}: a near-duplicate of {b}" for a, b in summary["near_duplicate_photos"].items()]
    lines += [f"converted {name}: {'; '.join(how)}" for name, how in summary["converted"].items()]
    lines += [f"no caption for {name}: left empty" for name in summary["without_caption"]]
    for line in lines:
        print(line, file=sys.stderr)


if __name__ == "__main__":
    run(main)
