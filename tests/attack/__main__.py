"""`python -m tests.attack`: everything that is tried to break the product. It goes on where it stopped.

Ends with exit code 1 where something failed, and with --report writes the table of docs/reliability.md and a row.
"""

from __future__ import annotations

import time
from pathlib import Path

from engine.io import rows
from engine.io.cli import Parser, run
from engine.io.files import atomic_write
from tests.attack import disk
from tests.attack.harness import Log, Result, Section, attack

DOCUMENT = rows.ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- attack -->", "<!-- /attack -->"


def sections() -> list[Section]:
    from tests.attack import folders, kills, pictures

    return [*pictures.SECTIONS, *folders.SECTIONS, *disk.sections(), *kills.SECTIONS]


def table(known: list[Section], results: dict[str, Result]) -> str:
    lines = [
        "| what | tries | failures | worst time, s | worst memory, MiB | commit |",
        "|---|---|---|---|---|---|",
    ]
    for section in known:
        if (found := results[section.name]).tries:
            figures = f"{found.tries} | {len(found.failures)} | {found.seconds:.1f} | {found.mib:.0f}"
            lines.append(f"| {section.about} | {figures} | {found.commit[:9]} |")
    return "\n".join(lines)


def report(known: list[Section], results: dict[str, Result]) -> None:
    figures = {}
    for name, r in results.items():
        worst = {"worst_s": r.seconds, "worst_mib": r.mib}
        figures[name] = {"tries": r.tries, "failures": len(r.failures), **worst, "commit": r.commit}
    rows.append_row("attack", sections=figures)  # first: the document makes the tree dirty
    text = DOCUMENT.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    atomic_write(DOCUMENT, f"{before}{BEGIN}\n{table(known, results)}\n{END}{after}")


def main() -> int:
    parser = Parser(prog="python -m tests.attack", description="Try to break everything, for an hour.")
    parser.add_argument("--minutes", type=float, default=60, help="time to spend at most")
    parser.add_argument("--out", type=Path, default=Path("runs/attack"), help="folder of what was tried")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="sections (default: all)")
    parser.add_argument("--tries", type=int | None, help="trials of each section, instead of its own number")
    parser.add_argument("--report", action="store_true", help="write the table of docs/reliability.md and a row")
    options = parser.parse_args()
    out = options.out.resolve()
    disk.start_over_with_library(out)
    known = sections()
    chosen = [s for s in known if not options.only or s.name in options.only]
    if not chosen:
        raise ValueError(f"--only must name some of {', '.join(s.name for s in known)}; got {' '.join(options.only)}")
    commit, dirty = rows.commit()
    log = Log(out, f"{commit}{'-dirty' if dirty else ''}")
    results = attack(chosen, log, out, time.monotonic() + 60 * options.minutes, options.tries)
    print(table(chosen, results))
    failures = [f for r in results.values() for f in r.failures]
    for failure in failures:
        print(failure)
    if options.report:
        report(known, {s.name: log.latest(s.name, s.tries) for s in known})
    return 1 if failures else 0


if __name__ == "__main__":
    run(main)
