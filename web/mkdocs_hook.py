"""Puts the browser page (web/dist, made by `npm run build`) into the documentation site, as app/."""

from pathlib import Path

from mkdocs.structure.files import File

DIST = Path(__file__).parent / "dist"
ABSENT = """<!doctype html><meta charset="utf-8"><title>GDPO-SR in the browser</title>
<p>This copy of the site was built without the browser page: <code>make web</code> builds it, and needs npm.</p>
"""


def on_files(files, config):
    if not (DIST / "index.html").is_file():
        files.append(File.generated(config, "app/index.html", content=ABSENT))
        return files
    for file in sorted(path for path in DIST.rglob("*") if path.is_file()):
        name = f"app/{file.relative_to(DIST).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(file)))
    return files
