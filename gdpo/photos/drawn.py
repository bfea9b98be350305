"""Pages of print and line art: photos of landscapes hold no letters, and what training lacks comes out rough."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

PANEL = 512
_FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral", "cmr10", "cmss10")
_BOLD = ("DejaVuSans-Bold", "DejaVuSerif-Bold", "STIXGeneralBol", "cmb10")
_LETTERS = "abcdefghijklmnopqrstuvwxyz" * 3 + "ABCDEFGHIJKLMNOPQRSTUVWXYZ" * 2 + "0123456789" * 2 + ".,:;!?&%/()+-"
Colour = tuple[int, int, int]


def page(seed: int, columns: int = 8, rows: int = 6) -> Image.Image:
    """A page of columns x rows panels of 512x512: text in many sizes and strokes, each panel in its own colours.

    Drawn at twice the size that crops are meant to have; `gdpo.prepare --halve true` gives smooth edges.
    """
    rng = random.Random(seed)
    sheet = Image.new("RGB", (columns * PANEL, rows * PANEL))
    for row in range(rows):
        for column in range(columns):
            kind = rng.choice([_text, _text, _text, _strokes, _shapes])
            sheet.paste(kind(rng), (column * PANEL, row * PANEL))
    return sheet


def draw_pages(out: Path, count: int = 2) -> None:
    """Write `count` pages to the folder `out` as PNG."""
    out.mkdir(parents=True, exist_ok=True)
    for seed in range(1, count + 1):
        page(seed).save(out / f"print-{seed}.png")


def small_pictures(count: int, side: int = 64, seed: int = 0) -> torch.Tensor:
    """[count,3,side,side] in [0,1]: print reduced to where it can hardly be read, and clouds of every fineness."""
    rng = random.Random(seed)
    torch_rng = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        if number % 2:
            panel = np.asarray(rng.choice([_text, _strokes, _shapes])(rng).resize((side, side), Image.Resampling.BOX))
            found.append(torch.from_numpy(panel.copy()).permute(2, 0, 1).float() / 255)
        else:
            cloud = torch.zeros(3, side, side)
            for octave in (4, 8, 16, 32, 64):
                rough = (
                    torch.randn(1, 3, octave, octave, generator=torch_rng) * (0.1 + 0.6 * rng.random()) / octave**0.5
                )
                gray = rough.mean(1, keepdim=True).expand_as(rough)
                cloud += F.interpolate(0.3 * rough + gray, (side, side), mode="bicubic")[0]
            found.append((cloud + 0.2 + 0.6 * rng.random()).clamp(0, 1))
    return torch.stack(found)


def _panel(rng: random.Random) -> tuple[Image.Image, Colour]:
    """A background that is lit from one side, and a colour that can be read on it."""
    paper = [rng.randrange(256) for _ in range(3)]
    if rng.random() < 0.5:  # most print is dark on light or light on dark
        paper = [rng.choice([rng.randrange(60), rng.randrange(190, 256)])] * 3
        paper = [min(255, max(0, c + rng.randrange(-12, 13))) for c in paper]
    light = sum(paper) / 3
    ink = [rng.randrange(0, 90) if light > 127 else rng.randrange(165, 256) for _ in range(3)]
    if rng.random() < 0.5:
        ink = [ink[0]] * 3
    angle, depth = rng.random() * 2 * math.pi, rng.random() * 40
    y, x = np.mgrid[-0.5 : 0.5 : PANEL * 1j, -0.5 : 0.5 : PANEL * 1j]
    shade = depth * (math.cos(angle) * x + math.sin(angle) * y)
    pixels = (np.array(paper) + shade[..., None]).clip(0, 255).round().astype(np.uint8)
    return Image.fromarray(pixels), (ink[0], ink[1], ink[2])


def _text(rng: random.Random) -> Image.Image:
    """Lines of random words, all of one font and size, sometimes turned."""
    from matplotlib import get_data_path

    panel, ink = _panel(rng)
    size = int(28 * 2 ** (rng.random() * 3.2))  # 28 to 257 pixels: 3 to 32 of an LR
    name = rng.choice(_FONTS if rng.random() < 0.6 else _BOLD)
    font = ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)
    layer = Image.new("L", (2 * PANEL, 2 * PANEL))
    draw = ImageDraw.Draw(layer)
    for top in range(0, 2 * PANEL, int(size * (1.1 + 0.4 * rng.random()))):
        words = ("".join(rng.choices(_LETTERS, k=rng.randint(1, 9))) for _ in range(2 + 2 * PANEL // size))
        draw.text((-rng.randrange(size), top), " ".join(words), fill=255, font=font)
    turn = rng.uniform(-12, 12) if rng.random() < 0.4 else 0
    layer = layer.rotate(turn, Image.Resampling.BICUBIC).crop((PANEL // 2, PANEL // 2, 3 * PANEL // 2, 3 * PANEL // 2))
    panel.paste(ink, (0, 0), layer)
    return panel


def _strokes(rng: random.Random) -> Image.Image:
    """Signs of straight and bent strokes, as of a script that nobody can read."""
    panel, ink = _panel(rng)
    side = rng.choice([64, 96, 128, 192])
    width = max(3, int(side * rng.uniform(0.05, 0.12)))
    draw = ImageDraw.Draw(panel)
    for top in range(0, PANEL, int(side * 1.2)):
        for left in range(0, PANEL, int(side * 1.15)):
            for _ in range(rng.randint(3, 8)):
                a, b, c, d = (rng.randrange(side) for _ in range(4))
                if rng.random() < 0.7:  # most strokes are level or upright
                    c, d = (a, d) if rng.random() < 0.5 else (c, b)
                draw.line((left + a, top + b, left + c, top + d), ink, width)
    return panel


def _shapes(rng: random.Random) -> Image.Image:
    """Circles, boxes, rays and hatching, filled or not."""
    panel, ink = _panel(rng)
    draw = ImageDraw.Draw(panel)
    for _ in range(rng.randint(3, 9)):
        x, y, r = rng.randrange(PANEL), rng.randrange(PANEL), rng.randrange(16, 160)
        colour = ink if rng.random() < 0.6 else (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        width, kind = rng.randrange(3, 14), rng.randrange(4)
        box = (x - r, y - r, x + r, y + r)
        if kind == 0:
            draw.ellipse(box, fill=colour if rng.random() < 0.4 else None, outline=colour, width=width)
        elif kind == 1:
            draw.rectangle(box, fill=colour if rng.random() < 0.4 else None, outline=colour, width=width)
        elif kind == 2:
            for turn in np.linspace(0, 2 * math.pi, rng.randint(6, 40), endpoint=False):
                draw.line((x, y, x + r * math.cos(turn), y + r * math.sin(turn)), colour, max(2, width // 2))
        else:
            gap, slope = rng.randrange(10, 30), rng.randrange(-r, r)
            for offset in range(-r, r, gap):
                draw.line((x + offset, y - r, x + offset + slope, y + r), colour, max(2, gap // 3))
    return panel
