"""Progress: an estimate for one picture and for a mixed folder, on a terminal, in a log and for a front end."""

import io
import json
import os
import pty
import subprocess
import sys
import time

import pytest

from engine.io import progress as progresses
from engine.io.progress import Progress, print_event


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test winds."""
    now = [0.0]
    monkeypatch.setattr(progresses.time, "monotonic", lambda: now[0])
    return now


def test_one_picture_has_an_estimate_from_its_first_tile_on(clock):
    with Progress(1, 100, quiet=True) as progress:
        progress.begin(100, input="a.png")
        assert progress.seconds_left() is None
        clock[0] = 10.0
        progress.tile(1, 63)
        assert progress.seconds_left() == pytest.approx(620.0)
        clock[0] = 40.0
        progress.tile(42, 63)
        assert progress.seconds_left() == pytest.approx(20.0)


def test_the_estimate_of_a_mixed_folder_counts_pixels_not_pictures(clock):
    """Nine small pictures and a large one: after the small ones nearly all is still to do."""
    events = []
    with Progress(10, 9 * 100 + 9100, quiet=True, event=events.append) as progress:
        for _ in range(9):
            progress.begin(100, input="small.png", output="o")
            clock[0] += 1.0
            progress.tile(1, 1)
            progress.end()
        assert progress.fraction() == pytest.approx(0.09)
        assert progress.seconds_left() == pytest.approx(91.0)
        progress.begin(9100, input="large.png", output="o")
        clock[0] += 45.5
        progress.tile(5, 10)
    assert events[-1] == {
        "event": "progress", "input": "large.png", "output": "o", "status": "working", "picture": 10, "pictures": 10,
        "tile": 5, "tiles": 10, "fraction": 0.545, "elapsed": 54.5, "eta": 45.5,
    }  # fmt: skip


def test_events_of_one_picture_come_ten_times_a_second_at_most_and_the_last_one_always(clock):
    events = []
    with Progress(1, 10, quiet=True, event=events.append) as progress:
        progress.begin(10, input="a", output="b")
        for tile in range(1, 1001):
            clock[0] += 0.001
            progress.tile(tile, 1000)
    assert [e["tile"] for e in events][:1] + [e["tile"] for e in events][-1:] == [1, 1000] and 8 <= len(events) <= 12


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress(2, 200, line_seconds=0.05) as progress:
        progress.begin(100, input="a.png")
        progress.tile(1, 4)
        deadline = time.monotonic() + 10
        while not sys.stderr.getvalue().count("\n") >= 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        lines = sys.stderr.getvalue().splitlines()
    assert len(lines) >= 2 and " 12% a.png: picture 1/2, tile 1/4, about 0:00:0" in lines[0]
    quiet = sys.stderr = io.StringIO()
    with Progress(1, 1, quiet=True, line_seconds=0.01):
        time.sleep(0.05)
    assert quiet.getvalue() == ""


TERMINAL = """
import time
from engine.io.progress import Progress
with Progress(1, 100) as progress:
    progress.begin(100, input="a.png")
    for tile in range(1, 5):
        time.sleep(0.15)
        progress.tile(tile, 4)
    progress.end()
"""


def test_a_terminal_shows_a_bar_with_tiles_and_the_time_left():
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", TERMINAL], stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait() == 0
    text = shown.decode()
    assert "50%|" in text and "tile 2/4 [00:00<00:00]" in text and "100%|" in text and "picture" not in text


def test_events_go_on_when_their_reader_has_left():
    code = """
import sys
from engine.io.progress import print_event
sys.stdin.readline()
for i in range(3): print_event({"i": i})
print("worked on", file=sys.stderr)
"""
    line = [sys.executable, "-c", code]
    process = subprocess.Popen(line, stdin=-1, stdout=-1, stderr=-1, text=True)
    process.stdout.close()
    process.stdin.write("go\n")
    process.stdin.close()
    assert process.stderr.read() == "worked on\n" and process.wait() == 0
    process.stderr.close()
    with open("/dev/full", "w") as disk:
        full = subprocess.run(line, input="go\n", stdout=disk, stderr=-1, text=True)
    assert full.returncode == 0 and full.stderr.count("warning: ") == 1 and full.stderr.endswith("worked on\n")


def test_an_event_is_one_line_of_ascii(capsys):
    print_event({"input": "\udcff\n\u00e9"})
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.isascii() and json.loads(out) == {"input": "\udcff\n\u00e9"}
