"""Pages of print, line art and patterns: photos of landscapes hold few, and what training lacks comes out rough."""

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


def page(seed: int, columns: int = 8, rows: int = 6, patterns: bool = False) -> Image.Image:
    """A page of columns x rows panels of 512x512, each in its own colours: text in many sizes and strokes, or patterns.

    Drawn at twice the size that crops are meant to have; `gdpo.prepare --halve true` gives smooth edges.
    """
    rng = random.Random(seed)
    kinds = [_stripes, _stripes, _stripes, _bricks, _windows] if patterns else [_text, _text, _text, _strokes, _shapes]
    sheet = Image.new("RGB", (columns * PANEL, rows * PANEL))
    for row in range(rows):
        for column in range(columns):
            sheet.paste(rng.choice(kinds)(rng), (column * PANEL, row * PANEL))
    return sheet


def draw_pages(out: Path, count: int = 2, patterns: bool = False) -> None:
    """Write `count` pages to the folder `out` as PNG."""
    out.mkdir(parents=True, exist_ok=True)
    for seed in range(1, count + 1):
        page(seed, patterns=patterns).save(out / f"{'patterns' if patterns else 'print'}-{seed}.png")


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


def _stripes(rng: random.Random) -> Image.Image:
    """Lines of one period: straight, waved, or around a point; 2 to 12 pixels of an LR from one to the next."""
    panel, ink = _panel(rng)
    y, x = np.mgrid[0:PANEL, 0:PANEL].astype(np.float64)
    period = 16 * 2 ** (rng.random() * 2.6)
    turn = rng.random() * math.pi
    if rng.random() < 0.4:
        phase = np.hypot(x - rng.uniform(-0.5, 1.5) * PANEL, y - rng.uniform(-0.5, 1.5) * PANEL)
    else:
        phase = math.cos(turn) * x + math.sin(turn) * y
        if rng.random() < 0.4:  # folds, as of a curtain or a shirt
            along = (math.cos(turn) * y - math.sin(turn) * x) / (PANEL * rng.uniform(0.1, 0.5))
            phase += rng.uniform(0.2, 1.5) * period * np.sin(along + rng.random() * 6)
    width = rng.uniform(0.25, 0.7)
    soft = rng.choice([1.0, 1.0, rng.uniform(1, period / 4)])  # pixels from one colour to the other
    cover = 0.5 + (width * period / 2 - np.abs((phase + rng.random() * period) % period - period / 2)) / soft
    mask = Image.fromarray((cover.clip(0, 1) * 255 * rng.uniform(0.4, 1)).astype(np.uint8))
    panel.paste(ink, (0, 0), mask)
    return panel


def _bricks(rng: random.Random) -> Image.Image:
    """A wall or tiles: each brick a little different, joints lighter or darker, slightly turned."""
    high = rng.randrange(24, 110)
    wide, joint, shift = int(high * rng.uniform(1, 3.2)), rng.randrange(3, 9), rng.choice([0.0, 0.5, 0.33])
    base = [rng.randrange(40, 216) for _ in range(3)]
    mortar = tuple(min(255, max(0, c + rng.choice([-1, 1]) * rng.randrange(25, 80))) for c in base)
    wall = Image.new("RGB", (2 * PANEL, 2 * PANEL), mortar)
    draw = ImageDraw.Draw(wall)
    spread = rng.randrange(2, 22)
    for row, top in enumerate(range(0, 2 * PANEL, high + joint)):
        for left in range(-wide, 2 * PANEL, wide + joint):
            tone = rng.randint(-spread, spread)
            colour = tuple(min(255, max(0, c + tone + rng.randint(-4, 4))) for c in base)
            start = left + int((row * shift) % 1 * wide)
            draw.rectangle((start, top, start + wide - 1, top + high - 1), fill=colour)
    wall = wall.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC)
    return wall.crop((PANEL // 2, PANEL // 2, 3 * PANEL // 2, 3 * PANEL // 2))


def _windows(rng: random.Random) -> Image.Image:
    """Rows of windows with frames and bars, on a wall that is lit from one side."""
    panel, ink = _panel(rng)
    draw = ImageDraw.Draw(panel)
    wide, high = rng.randrange(50, 200), rng.randrange(50, 200)
    gap, frame, bar = rng.randrange(16, 80), rng.randrange(3, 14), rng.randrange(2, 8)
    columns, rows = rng.randint(1, 4), rng.randint(1, 4)
    edge = tuple(rng.randrange(256) for _ in range(3))
    left, top = rng.randrange(-wide, 0), rng.randrange(-high, 0)
    for y in range(top, PANEL, high + gap):
        for x in range(left, PANEL, wide + gap):
            glass = tuple(min(255, max(0, c + rng.randint(-30, 30))) for c in ink)
            draw.rectangle((x, y, x + wide, y + high), fill=glass, outline=edge, width=frame)
            for i in range(1, columns):
                at = x + i * wide // columns
                draw.line((at, y, at, y + high), edge, bar)
            for i in range(1, rows):
                at = y + i * high // rows
                draw.line((x, at, x + wide, at), edge, bar)
    return panel.rotate(rng.choice([0, 90, 180, 270]))
