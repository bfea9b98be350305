"""Real pairs: which LR picture belongs to which HR picture, and whether their sizes fit."""

from __future__ import annotations

from typing import NamedTuple

from gdpo.photos.folder import side_of, stem_of, without_side
from gdpo.photos.store import Found, Store
from gdpo.photos.stores import FileList, open_store

_LARGEST = 8  # times that an HR picture may be larger than its LR


class Pairs(NamedTuple):
    """HR pictures, each with its LR.

    Attributes:
        hr, lr: where they lie.
        found: the HR pictures with their partners; `size` is what the LR shows, or why the pair cannot be used.
        notes: what was left out, a line each.
    """

    hr: Store
    lr: Store
    found: list[Found]
    notes: list[str]


def open_pairs(lr: str, hr: str, *, skip_broken: bool = False, progress: bool = True) -> Pairs:
    """Match LR and HR pictures by name; those of two list files line by line.

    Names match as they are (0001.png and 0001.png), or without what tells HR from LR: 0001_HR and 0001_LR4, 0001 and
    0001x4, HR/0001 and LR/0001, 0001.hr and 0001.lr in a shard. `lr` and `hr` may be the same folder or archive.

    Args:
        skip_broken: leave out pictures without partner instead of refusing them.

    Raises:
        ValueError: pictures without partner, or two of one name; counted, and the first one named. See `open_store`.
    """
    of_hr = open_store(hr, pairs=True, skip_broken=skip_broken, progress=progress)
    of_lr = of_hr if lr == hr else open_store(lr, pairs=True, skip_broken=skip_broken, progress=progress)
    notes = list(dict.fromkeys([*of_hr.notes, *of_lr.notes]))
    if isinstance(of_hr, FileList) and isinstance(of_lr, FileList) and of_hr is not of_lr:
        if len(of_hr.found) != len(of_lr.found):
            raise ValueError(
                f"{hr} lists {len(of_hr.found)} pictures and {lr} {len(of_lr.found)}: a line of one belongs to the "
                "same line of the other"
            )
        matched = list(zip(of_hr.found, of_lr.found))
    else:
        matched = _by_name(of_hr, of_lr, skip_broken, notes)
    found = [h._replace(size=_shown(of_hr, of_lr, h, l), partner=l) for h, l in matched]
    return Pairs(of_hr, of_lr, found, notes)


def _by_name(hr: Store, lr: Store, skip_broken: bool, notes: list[str]) -> list[tuple[Found, Found]]:
    large, small = _of_side(hr, "HR", hr is lr), _of_side(lr, "LR", hr is lr)
    first, second = _keyed(hr, large, _exact), _keyed(lr, small, _exact)
    if hr is lr or not first.keys() <= second.keys():
        first, second = _keyed(hr, large, without_side), _keyed(lr, small, without_side)
    for whose, mine, theirs, other in ((hr, first, second, "LR"), (lr, second, first, "HR")):
        lonely = [picture for key, picture in mine.items() if key not in theirs]
        if lonely:
            where = lr.where if other == "LR" else hr.where
            more = f", nor have {len(lonely) - 1} more of {len(mine)}" if len(lonely) > 1 else ""
            line = f"{whose.label(lonely[0])} has no {other} picture in {where}{more}"
            if not skip_broken or len(lonely) == len(mine):
                raise ValueError(f"{line}; names must match, as x.png or x_HR.png and x_LR4.png do" +
                                 ("" if len(lonely) == len(mine) else ", or --data.on_error skip"))  # fmt: skip
            notes.append(f"left out: {line}")
    return [(picture, second[key]) for key, picture in first.items() if key in second]


def _of_side(store: Store, side: str, both: bool) -> list[Found]:
    """The pictures of this side, where the store holds both."""
    sides = [side_of(picture.name) for picture in store.found]
    if not both and not (store.sides and {"HR", "LR"} <= set(sides)):
        return store.found
    kept = [picture for picture, own in zip(store.found, sides) if own == side or (own is None and side == "HR")]
    if not kept:
        raise ValueError(
            f"{store.where} holds no {side} pictures by their names, such as x_{'HR' if side == 'HR' else 'LR4'}.png "
            f"or {side.lower()}/x.png; its first is called {store.found[0].name}"
        )
    return kept


def _exact(name: str) -> str:
    return stem_of(name)


def _keyed(store: Store, pictures: list[Found], key_of) -> dict[str, Found]:
    keyed: dict[str, Found] = {}
    for picture in pictures:
        key = key_of(picture.name)
        if key in keyed:
            raise ValueError(f"{store.label(keyed[key])} and {store.label(picture)} have the same name for a pair")
        keyed[key] = picture
    return keyed


def _shown(hr: Store, lr: Store, large: Found, small: Found) -> tuple[int, int] | str:
    """(width, height) of the HR that the LR shows, or why they are no pair."""
    if isinstance(large.size, str):
        return large.size
    if isinstance(small.size, str):
        return small.size
    scale = magnification(large.size, small.size)
    if scale:
        return small.size[0] * scale, small.size[1] * scale
    return (
        f"{hr.label(large)} is {large.size[0]}x{large.size[1]} and its LR {lr.label(small)} "
        f"{small.size[0]}x{small.size[1]}: it must be 1 to {_LARGEST} times as large, the same in both directions"
    )


def magnification(large: tuple[int, int], small: tuple[int, int]) -> int:
    """How many times larger `large` is; fewer rows or columns than that may be left over at its end. 0: it is not."""
    scale = large[0] // max(1, small[0])
    fits = all(0 <= l - scale * s < scale for l, s in zip(large, small))
    return scale if fits and 1 <= scale <= _LARGEST else 0
