"""Kinds of files that are not read, by name, so that a refusal can say what a file is and what to do with it."""

from __future__ import annotations

import re

_PNG = "save it as PNG or TIFF first"
_FLATTEN = "export it as PNG or TIFF first"
_DEVELOP = "develop it to TIFF or PNG first"
_TONE = "tone-map it to PNG or TIFF of 8 or 16 bit first"
_FRAMES = "extract the frames first"
_FTYP = rb".{4}ftyp"

# Name, the first bytes as a regular expression, what to do.
_KINDS: tuple[tuple[str, bytes, str], ...] = (
    ("a JPEG 2000 picture", rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", _PNG),
    ("a Photoshop document", rb"8BPS", _FLATTEN),
    ("a GIMP document", rb"gimp xcf", _FLATTEN),
    ("an OpenEXR picture", rb"\x76\x2f\x31\x01", _TONE),
    ("a Radiance HDR picture", rb"#\?(?:RADIANCE|RGBE)", _TONE),
    ("a PFM picture", rb"P[Ff]\s", _TONE),
    ("a camera's raw file (CR3)", _FTYP + rb"crx ", _DEVELOP),
    ("a camera's raw file (RAF)", rb"FUJIFILMCCD-RAW", _DEVELOP),
    ("a camera's raw file (ORF)", rb"II(?:RO|RS)|MMOR", _DEVELOP),
    ("a camera's raw file (RW2)", rb"IIU\0", _DEVELOP),
    ("a camera's raw file (CR2)", rb"II\*\0.{4}CR", _DEVELOP),
    ("an icon (ICO)", rb"\0\0[\x01\x02]\0[^\0]\0", _PNG),
    ("a JPEG XR picture", rb"II\xbc", _PNG),
    ("a DDS texture", rb"DDS ", _PNG),
    ("a QOI picture", rb"qoif", _PNG),
    ("a PCX picture", rb"\x0a[\0\x02-\x05]\x01[\x01\x02\x04\x08]", _PNG),
    ("a FITS picture", rb"SIMPLE  =", _PNG),
    ("a metafile (WMF)", rb"\xd7\xcd\xc6\x9a", _PNG),
    ("an SVG drawing", rb"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*(?:<!DOCTYPE\s+svg|<svg)", _FLATTEN),
    ("a PDF", rb"%PDF-", "extract its pictures or render its pages as PNG first"),
    ("PostScript", rb"%!PS", "render it as PNG first"),
    ("a video", _FTYP + rb"(?:iso[m2-9]|mp4|M4V|qt  |avc1|3gp)|\x1aE\xdf\xa3|RIFF.{4}AVI ", _FRAMES),
    ("a page of HTML", rb"\s*<(?i:!doctype html|html|head)", "the download may have failed"),
    ("a Git LFS pointer", rb"version https://git-lfs", "fetch the file: git lfs pull"),
    ("a ZIP archive", rb"PK\x03\x04", "unpack it first"),
)  # fmt: skip


def what_to_do(head: bytes) -> str | None:
    """What a file is by its first bytes and what to do with it, as words for a message; None where it is unknown."""
    for name, begins, remedy in _KINDS:
        if re.match(begins, head, re.S):
            return f"{name}, which is not read; {remedy}"
    return None
