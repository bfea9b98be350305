"""The HTTP service: the command line's bytes, for many at a time, whatever others send."""

import io
import itertools
import json
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image
from skimage import data

from engine.runtime.manifest import Profile
from tests.support.folders import model, write_folder
from tests.support.service import ROOT, Service

for package in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
    pytest.importorskip(package, reason="the extra serve is not installed (pip install -e '.[serve]')")

SUFFIXES = ("png", "jpg", "webp", "tif")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A synthetic model with tiles of any side, and with one side alone, as a plan has it."""
    root = tmp_path_factory.mktemp("serve")
    return {
        "dynamic": write_folder(root / "dynamic", model()),
        "static": write_folder(root / "static", model(), profile=Profile((4, 4, 8), (128, 128, 128))),
    }


@pytest.fixture(scope="module")
def service(folders):
    with Service("--model", folders["dynamic"], "--body-seconds", "2", "--max-mib", "2") as running:
        yield running


def encoded(pixels: np.ndarray, suffix: str = "png", **more) -> bytes:
    out = io.BytesIO()
    kind = {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
    Image.fromarray(pixels).save(out, kind, **more)
    return out.getvalue()


def cropped(i: int, largest: int = 70) -> np.ndarray:
    rng = np.random.default_rng(i)
    height, width = rng.integers(5, largest, 2)
    top, left = rng.integers(0, 512 - largest, 2)
    return data.astronaut()[top : top + height, left : left + width].copy()


def command_line(pictures: dict[str, bytes], folder: Path, tmp_path: Path, *options: str) -> dict[str, bytes]:
    """What `python -m engine.upscale` makes of them."""
    (tmp_path / "in").mkdir(parents=True)
    for name, content in pictures.items():
        (tmp_path / "in" / name).write_bytes(content)
    command = [sys.executable, "-m", "engine.upscale", "-i", tmp_path / "in", "-o", tmp_path / "out", "-n", folder]
    subprocess.run([*command, "--no-progress", *options], cwd=ROOT, check=True, timeout=300)
    return {name: (tmp_path / "out" / name).read_bytes() for name in pictures}


@pytest.mark.parametrize(
    ("kind", "count"), [("dynamic", 32), ("static", 32), pytest.param("static", 200, marks=pytest.mark.slow)]
)
def test_answers_have_the_bytes_of_the_command_line(folders, tmp_path, kind, count):
    pictures = {f"{i}.{s}": encoded(cropped(i), s) for i, s in zip(range(count), itertools.cycle(SUFFIXES))}
    pictures["large.png"] = encoded(data.astronaut()[:150, :200])
    expected = command_line(pictures, folders[kind], tmp_path, "--seed", "7")
    with Service("--model", folders[kind]) as running, ThreadPoolExecutor(16) as clients:
        answers = dict(zip(pictures, clients.map(lambda p: running.post(p[1], p[0], seed=7), pictures.items())))
        figures = running.figures()
    assert {name: answer.status_code for name, answer in answers.items()} == dict.fromkeys(pictures, 200)
    assert [name for name in pictures if answers[name].content != expected[name]] == []
    assert figures["gdpo_upscale_seconds_count"] == len(pictures)
    if kind == "static":  # tiles of one size: those of different pictures share a batch
        assert figures["gdpo_batch_tiles_sum"] / figures["gdpo_batch_tiles_count"] > 1.5


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 5, "tile": 32, "color": "adain"},
        {"scale": 2.5, "format": "jpg", "quality": 80},
        {"longest": 100, "wrap": "both", "format": "WebP", "lossless": "true"},
        {"background": "white", "strip_metadata": "true", "format": "tif"},
    ],
)
def test_options_mean_what_they_mean_on_the_command_line(service, folders, tmp_path, fields):
    rgba = np.dstack([cropped(3), np.arange(cropped(3)[..., 0].size, dtype=np.uint8).reshape(cropped(3).shape[:2])])
    content = encoded(rgba if "background" in fields else cropped(3), dpi=(300, 300))
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in fields.items() if v != "true" and k != "wrap"]
    flags += [f"--{k.replace('_', '-')}" for k, v in fields.items() if v == "true" or k == "wrap"]
    source = tmp_path / "in.png"
    source.write_bytes(content)
    command = [sys.executable, "-m", "engine.upscale", source, tmp_path / "out/", "-n", folders["dynamic"], *flags]
    subprocess.run([*command, "--no-progress"], cwd=ROOT, check=True, timeout=120)
    answer = service.post(content, **fields)
    assert answer.status_code == 200, answer.text
    assert answer.content == next((tmp_path / "out").glob("in.*")).read_bytes()
    kind = fields.get("format", "png").lower()
    assert answer.headers["content-disposition"] == f"attachment; filename*=UTF-8''in.{kind}"


def png_of(width: int, height: int, pixels: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def raw(service, head: str, body: bytes = b"", pause: float = 0) -> int:
    """The status of the answer to bytes sent as they are; 0 for none."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode())
        for i in range(0, len(body), 10 if pause else len(body) or 1):
            try:
                connection.sendall(body[i : i + 10] if pause else body)
            except OSError:
                break
            time.sleep(pause)
        try:
            answer = connection.recv(1000)
        except OSError:
            return 0
    return int(answer.split()[1]) if answer else 0


def bad_requests(service) -> list:
    """(what, the statuses that are right, how to send it)"""
    good, url = encoded(cropped(1)), f"{service.url}/v1/upscale"
    jpeg, tiff = encoded(cropped(2), "jpg"), encoded(cropped(2), "tif")
    black = encoded(np.zeros((700, 700, 3), np.uint8))
    post = "POST /v1/upscale HTTP/1.1\nHost: x\n"
    unbounded = post + "Content-Type: multipart/form-data\n"
    multipart = post + "Content-Type: multipart/form-data; boundary=b\n"
    long, slow = multipart + "Content-Length: 99999999999\n", multipart + "Content-Length: 5000\n"
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    bomb = zlib.compress(bytes(30_000_000))

    def chunk(content: bytes) -> bytes:
        return b"%x\r\n%s\r\n" % (len(content), content)

    cases = [
        *[(f"png cut at {n}", {422}, good[:n]) for n in (20, 33, 60, 500, len(good) - 30)],
        *[(f"jpeg cut at {n}", {422}, jpeg[:n]) for n in (10, 100, 400)],
        *[(f"tiff cut at {n}", {422}, tiff[:n]) for n in (8, 100)],
        *[(f"png of {w}x{h}", {413}, png_of(w, h, bomb[:2000])) for w, h in ((60_000, 60_000), (16_001, 1_000))],
        ("png with too much data", {422, 200}, png_of(50, 50, bomb)),
        ("png without enough data", {422}, png_of(5000, 3000, zlib.compress(b"0"))),
        ("png of no width", {422}, png_of(0, 10, b"")),
        *[(f"no picture: {c[:8]!r}", {415}, c) for c in (b"", b"hi", b"GIF90a", b"%PDF-1.7", b"PK\3\4", bytes(99))],
        ("text", {415}, Path(__file__).read_bytes()),
        ("damaged", {422}, good[:70] + bytes(200) + good[270:]),
        ("too many bytes", {413}, bytes(3 << 20)),
    ]  # fmt: skip
    sent = [(what, right, lambda c=c: service.post(c).status_code) for what, right, c in cases]
    fields = [{"seed": -1}, {"seed": "x"}, {"scale": 1000}, {"scale": "nan"}, {"scale": 2, "width": 9}, {"tile": 7},
              {"tile": 99_999}, {"color": "sepia"}, {"format": "exe"}, {"quality": 0}, {"background": "no"},
              {"sede": 3}, {"longest": -4}, {"wrap": "up"}, {"width": "9" * 400}]  # fmt: skip
    sent += [(str(f), {422}, lambda f=f: service.post(good, **f).status_code) for f in fields]
    sent += [
        ("result too large", {413}, lambda: service.post(black, scale=64).status_code),
        ("json", {415}, lambda: requests.post(url, json={"image": "x"}, timeout=30).status_code),
        ("no type", {415}, lambda: requests.post(url, data=good, timeout=30).status_code),
        ("no image", {422}, lambda: requests.post(url, files={"seed": (None, "3")}, timeout=30).status_code),
        ("image as text", {422}, lambda: requests.post(url, files={"image": (None, "3")}, timeout=30).status_code),
        ("get", {405}, lambda: requests.get(url, timeout=30).status_code),
        ("elsewhere", {404}, lambda: requests.post(f"{service.url}/v2", files={"a": b"b"}, timeout=30).status_code),
        ("no http", {400}, lambda: raw(service, "hello there\n\n")),
        ("huge headers", {400, 431}, lambda: raw(service, f"{post}X: {'a' * 200_000}\n\n")),
        ("bad length", {400}, lambda: raw(service, f"{multipart}Content-Length: many\n\n")),
        ("length too large", {413}, lambda: raw(service, f"{long}Expect: 100-continue\n\n")),
        ("no boundary", {400}, lambda: raw(service, f"{unbounded}Content-Length: 3\n\n", b"abc")),
        ("chunks without end", {413, 0}, lambda: raw(service, f"{multipart}Transfer-Encoding: chunked\n\n",
         chunk(part) + 40 * chunk(bytes(65536)))),
        *[(f"slow body {i}", {408}, lambda: raw(service, f"{slow}\n", part, 0.3)) for i in (1, 2)],
        ("body never comes", {408}, lambda: raw(service, f"{slow}\n", part)),
        ("headers never end", {408}, lambda: raw(service, post)),
        ("slow headers", {408, 0}, lambda: raw(service, post, 30 * b"X: a\r\n", 0.3)),
        ("nothing comes", {408}, lambda: raw(service, "")),
    ]  # fmt: skip
    return sent


def test_what_would_be_passed_over_in_silence_is_refused(service):
    good, url = encoded(cropped(5)), f"{service.url}/v1/upscale"
    in_address = requests.post(url, params={"seed": 3}, files={"image": ("a.png", good)}, timeout=30)
    assert in_address.status_code == 422 and "options are fields of the form" in in_address.json()["error"]
    two = requests.post(url, files=[("image", ("a.png", good)), ("image", ("b.png", good))], timeout=30)
    assert two.status_code == 422 and "one picture a request" in two.json()["error"]
    text = requests.post(url, files={"image": (None, "3")}, timeout=30)
    assert text.json() == {"error": "image: send the picture as a file, with a name"}


def test_methods(service):
    """Load balancers ask by HEAD; whoever takes a wrong method is told which are right."""
    for address in ("/health", "/ready"):
        assert requests.head(f"{service.url}{address}", timeout=30).status_code == 200
    answer = requests.put(f"{service.url}/v1/upscale", timeout=30)
    assert answer.status_code == 405 and answer.headers["Allow"] == "POST"


def test_fifty_bad_requests_get_their_answers_while_good_ones_go_on(service):
    good = encoded(cropped(5))
    expected, stop, answers = service.post(good).content, threading.Event(), []

    def go_on():
        while not stop.is_set():
            answers.append(service.post(good).content)

    bad = bad_requests(service)
    assert len(bad) >= 50
    with ThreadPoolExecutor(10) as clients:
        others = [clients.submit(go_on) for _ in range(2)]
        given = list(clients.map(lambda case: case[2](), bad))
        stop.set()
        for other in others:
            other.result()
    wrong = [f"{what}: {code}" for (what, right, _), code in zip(bad, given) if code not in right]
    assert wrong == []
    assert len(answers) > 5 and set(answers) == {expected}
    assert service.post(good).content == expected


def test_a_refusal_is_one_sentence(service):
    answer = service.post(encoded(cropped(1))[:60], "café.png")
    assert (
        answer.json()["error"].startswith("café.png: damaged") and answer.headers["content-type"] == "application/json"
    )
    assert service.post(encoded(cropped(1)), sede=3).json() == {"error": "sede: there is no such field (see /docs)"}
    rgba = encoded(np.zeros((9, 9, 4), np.uint8))
    assert service.post(rgba, "a.png", format="jpg").json()["error"].startswith("a.png: JPEG cannot hold")
    raw = service.post(b"II*\0\x10\0\0\0CR\2\0" + bytes(99), "a.jpg")
    words = "a.jpg: a camera's raw file (CR2), which is not read; develop it to TIFF or PNG first"
    assert raw.status_code == 415 and raw.json() == {"error": words}


def test_the_service_describes_itself(service):
    document = requests.get(f"{service.url}/openapi.json", timeout=30).json()
    fields = document["components"]["schemas"]["Upscale"]["properties"]
    assert fields["image"]["contentMediaType"] == "application/octet-stream" and "seed" in fields
    assert {"413", "415", "422", "429"} <= document["paths"]["/v1/upscale"]["post"]["responses"].keys()
    assert "swagger" in requests.get(f"{service.url}/docs", timeout=30).text
    assert requests.get(f"{service.url}/health", timeout=30).text == "ok"
    assert requests.get(f"{service.url}/ready", timeout=30).text == "ready"


def test_a_token_is_asked_for_pictures_alone(folders):
    with Service("--model", folders["dynamic"], GDPO_TOKEN="secret") as running:
        content = encoded(cropped(1))
        url, files = f"{running.url}/v1/upscale", {"image": ("a.png", content)}
        assert running.post(content).status_code == 401
        sent = (
            "Bearer wrong",
            "Bearer sécret".encode(),
            "Bearer",
            "secret",
            "Basic secret",
            "Bearer secret",
            "bearer secret",
        )
        given = [requests.post(url, files=files, headers={"Authorization": s}, timeout=30).status_code for s in sent]
        assert given == [401] * 5 + [200] * 2
        assert requests.get(f"{running.url}/metrics", timeout=30).status_code == 200


def test_a_full_queue_says_when_to_come_back(folders):
    slow = encoded(np.resize(data.astronaut(), (300, 300, 3)))
    with (
        Service("--model", folders["dynamic"], "--at-once", 1, "--queue", 1) as running,
        ThreadPoolExecutor(8) as clients,
    ):
        answers = list(clients.map(lambda _: running.post(slow), range(8)))
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429} and codes.count(200) >= 2
    assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status_code == 429)


def test_what_takes_too_long_is_given_up(folders):
    with Service("--model", folders["dynamic"], "--seconds", 0.05) as running:
        answer = running.post(encoded(np.resize(data.astronaut(), (400, 400, 3))), "slow.png")
        assert answer.status_code == 504 and "not finished within 0.05 seconds" in answer.json()["error"]


def test_sigterm_under_load_loses_nothing_that_was_accepted(folders):
    content = encoded(np.resize(data.astronaut(), (120, 120, 3)))
    with Service("--model", folders["dynamic"]) as running:
        expected, answers, lost = running.post(content).content, [], []

        def go_on():
            while True:
                try:
                    answer = running.post(content)
                except requests.ConnectionError as error:
                    if "refused" not in str(error):  # else it was never accepted
                        lost.append(str(error))
                    return
                answers.append(answer)
                if answer.status_code == 503:
                    return

        clients = [threading.Thread(target=go_on) for _ in range(12)]
        for client in clients:
            client.start()
        while len(answers) < 12:
            time.sleep(0.05)
        running.terminate()
        for client in clients:
            client.join()
        code, stderr = running.wait()
    # Whoever connects while the service stops to listen is reset by the system, which nobody can prevent.
    assert len(lost) <= 1 and all("reset by peer" in error for error in lost), lost
    assert {answer.status_code for answer in answers} <= {200, 503}
    assert {answer.content for answer in answers if answer.status_code == 200} == {expected}
    assert code == 0 and "all accepted pictures were finished" in stderr


def test_whoever_has_just_connected_is_told_that_the_service_stops(folders):
    with Service("--model", folders["dynamic"]) as running:
        assert requests.get(f"{running.url}/ready", timeout=30).status_code == 200
        with socket.create_connection(("127.0.0.1", running.port), timeout=30) as connected:
            running.terminate()
            while True:  # until nobody else can connect
                try:
                    socket.create_connection(("127.0.0.1", running.port), timeout=30).close()
                except ConnectionError:
                    break
            connected.sendall(b"POST /v1/upscale HTTP/1.1\r\nHost: here\r\nContent-Length: 0\r\n\r\n")
            answer = connected.recv(1000)
        code, _ = running.wait()
    assert answer.startswith(b"HTTP/1.1 503 ") and code == 0


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_memory_stays_flat(folders, count):
    pictures = [encoded(cropped(i, 40), s) for i, s in zip(range(40), itertools.cycle(SUFFIXES))]
    with Service("--model", folders["dynamic"]) as running, ThreadPoolExecutor(8) as clients:

        def send(times: int) -> int:
            chosen = itertools.islice(itertools.cycle(pictures), times)
            assert {a.status_code for a in clients.map(running.post, chosen)} == {200}
            return running.resident()

        before = send(200)
        after = send(count)
    assert after <= 1.05 * before, f"{before / 2**20:.1f} -> {after / 2**20:.1f} MiB"


def test_bad_usage_is_one_line(folders, tmp_path):
    def stderr(*arguments):
        command = [sys.executable, "-m", "engine.serve", "--model", folders["dynamic"], *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen on 127.0.0.1" in stderr("--port", taken.getsockname()[1])
    assert "at-once must be more than 0; got 0" in stderr("--at-once", 0, "--port", 0)
    assert "batch must be 1 to 8 for this model; got 9" in stderr("--batch", 9, "--port", 0)

    assert json.dumps(stderr("--backend", "torch", "--port", 0)).count("is not served") == 1
