"""Names of devices: cpu, cuda, cuda:N."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A device by its kind, "cpu" or "cuda", and its number."""

    kind: str
    index: int = 0

    @classmethod
    def parse(cls, text: str | None, kinds: tuple[str, ...], backend: str) -> Device:
        """What a user calls a device.

        Args:
            text: "cpu", "cuda" or "cuda:N"; None takes the first of `kinds`.
            kinds: what the backend runs on.
            backend: for the message.

        Raises:
            ValueError: another name, or a kind that the backend does not run on.
        """
        if text is None:
            return cls(kinds[0])
        found = re.fullmatch(r"cpu|(cuda)(?::([0-9]{1,3}))?", text)
        kind = (found[1] or "cpu") if found else None
        if found is None or kind not in kinds:
            names = [name for kind in kinds for name in (("cuda", "cuda:N") if kind == "cuda" else (kind,))]
            listed = " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
            raise ValueError(f"device must be {listed} for {backend}; got {text!r}")
        return cls(kind, int(found[2] or 0))
