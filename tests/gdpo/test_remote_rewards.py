"""Rewards over HTTP: the same floats as in process, servers that are gone, slow or wrong, kills of both sides."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from engine.io.cli import Terminated
from gdpo.scores.registry import SCORES
from gdpo.scores.remote import STOPPING, Patience, RemoteReward, answer
from gdpo.scores.rewards import build_rewards, require_finite
from gdpo.train.methods.gdpo import GDPO as Method
from tests.gdpo.test_train_faults import start, tree_bytes, wait_for_rows
from tests.support.training import GDPO, ROOT, environment, train, train_here

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
B, G = 2, 3
QUICK = Patience(timeout=2, wait=0.5)


@pytest.fixture
def group():
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(B, 3, 64, 64, generator=generator) * 2 - 1
    return (target[:, None] + 0.2 * torch.randn(B, G, 3, 64, 64, generator=generator)).clamp(-1, 1), target


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def serving(*names: str):
    """The real application, in a thread of this process; its address."""
    import uvicorn

    from gdpo.rewards import application

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(application(list(names), "cpu"), log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/score"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def answering(reply, kind="perceptual"):
    """A server of any behaviour: reply(handler) writes the answer to a POST."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def give(self, content: bytes, code: int = 200):
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):
            self.give(json.dumps({"name": "mine", "kind": kind}).encode())

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            reply(self)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/score"
    finally:
        server.shutdown()
        server.server_close()


def test_scores_are_those_of_this_process_to_the_bit(group):
    here = build_rewards(["naturalness", "ssim_y"])
    with serving("naturalness", "ssim_y") as url:
        there = build_rewards([f"{url}/naturalness", f"{url}/ssim_y"])
        for own, remote in zip(here, there):
            assert (own.name, own.kind) == (remote.name, remote.kind)
            assert torch.equal(own.score(*group, None), remote.score(*group, None))
        with pytest.raises(ValueError, match=r"refuses: 404 no such reward here; there is /score/naturalness, /score/"):
            RemoteReward(url, QUICK)
        with pytest.raises(ValueError, match=r"'ssim_y' twice"):
            build_rewards([f"{url}/ssim_y", "ssim_y"])
        (refused,) = build_rewards([f"{url}/naturalness"])
        with pytest.raises(ValueError, match=r"reward 'naturalness': .* refuses: 422 .*sides of at least 64"):
            refused.score(group[0][..., :32, :32], group[1][..., :32, :32], None)


@pytest.mark.parametrize("name", [name for name, score in SCORES.items() if score.statistic])
def test_a_reward_that_training_takes_from_its_statistics_is_refused_at_start(name):
    from gdpo.rewards import application

    with pytest.raises(ValueError, match=f"reward '{name}' is not served: .* without a URL; served are .*naturalness"):
        application(["ssim_y", name], "cpu")


def test_a_body_that_is_none_is_refused():
    for body in (b"", b"\x80\x04N.", save({"samples": torch.zeros(1)})):
        with pytest.raises(ValueError, match="must be safetensors with samples and target"):
            answer(body, lambda x, y: x, torch.device("cpu"))
    half = save({"samples": torch.zeros(1).half(), "target": torch.zeros(1)})
    with pytest.raises(ValueError, match="must be float32"):
        answer(half, lambda x, y: x, torch.device("cpu"))


@pytest.mark.parametrize(
    ("content", "code", "reason"),
    [
        (save({"scores": torch.zeros(B, G + 1)}), 200, r"one number per picture, scores \[2, 3\]; got torch.float32"),
        (save({"scores": torch.zeros(B * G)}), 200, r"got torch.float32 \[6\]"),
        (save({"scores": torch.zeros(B, G, dtype=torch.int64)}), 200, r"got torch.int64"),
        (save({"values": torch.zeros(B, G)}), 200, "must answer safetensors with scores"),
        (b"[1.0, 2.0]", 200, "must answer safetensors with scores"),
        (b'{"detail": "out of paper"}', 400, "refuses: 400 out of paper"),
        (b"no JSON", 500, r"did not answer for 0.5 s \(500 "),
        (b"later", 429, r"did not answer for 0.5 s \(429 "),
        (b"<html>\nlog in\n</html>", 200, "must answer safetensors with scores; got b'<html>"),
        (b"", 200, "must answer safetensors with scores; got b''"),
        (bytes(20 << 20), 200, "answers more than 16 MiB"),
    ],
)
def test_a_wrong_answer_is_one_line_that_names_the_reward(content, code, reason, group):
    with answering(lambda handler: handler.give(content, code)) as url:
        (reward,) = build_rewards([url], patience=QUICK)
        with pytest.raises(ValueError, match=f"reward 'mine': {url} .*{reason}") as error:
            reward.score(*group, None)
        assert "\n" not in str(error.value)


def trickle(handler):
    """A byte now and then, for ever: no pause is as long as the time-out."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    with suppress(OSError):  # until the other side has gone
        while True:
            handler.wfile.write(b"1\r\na\r\n")
            handler.wfile.flush()
            time.sleep(0.05)


def elsewhere(handler):
    handler.send_response(302)
    handler.send_header("Location", "/login")
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def cut(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(save({"scores": torch.zeros(B, G)}))
    handler.close_connection = True


def garbled(handler):
    handler.wfile.write(b"\1no\nHTTP\r\n\r\n")
    handler.close_connection = True


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (trickle, r"did not answer for 0.5 s \(timed out\)"),
        (elsewhere, r"is elsewhere: 302 Found \(/login\); name the address itself"),
        (cut, r"did not answer for 0.5 s \(IncompleteRead"),
        (garbled, r"did not answer for 0.5 s \(.*no"),
        (lambda handler: setattr(handler, "close_connection", True), r"did not answer for 0.5 s \(Remote end closed"),
    ],
)
def test_a_server_that_misbehaves_is_one_line(reply, reason, group):
    with answering(reply) as url:
        (reward,) = build_rewards([url], patience=Patience(timeout=0.4, wait=0.5))
        began = time.monotonic()
        with pytest.raises(ValueError, match=f"reward 'mine': {url} {reason}") as error:
            reward.score(*group, None)
        assert "\n" not in str(error.value) and time.monotonic() - began < 5


def test_nan_is_named(group):
    values = torch.zeros(B, G)
    values[1, 2] = float("nan")
    with answering(lambda handler: handler.give(save({"scores": values}))) as url:
        (reward,) = build_rewards([url])
        with pytest.raises(ValueError, match="reward 'mine' is nan for image 1, sample 2 of the batch"):
            require_finite({reward.name: reward.score(*group, None)})


def test_a_server_that_is_gone_or_slow_is_asked_again_and_then_given_up(group, capsys):
    calls = []

    def slow_then_right(handler):
        calls.append(0)
        if len(calls) == 1:
            time.sleep(1)
        handler.give(save({"scores": torch.ones(B, G)}))

    with answering(slow_then_right) as url:
        (reward,) = build_rewards([url], patience=Patience(timeout=0.3, wait=20))
        assert torch.equal(reward.score(*group, None), torch.ones(B, G)) and len(calls) >= 2
    assert f"waiting for the reward at {url}" in capsys.readouterr().err
    remote = RemoteReward.__new__(RemoteReward)
    remote.url, remote.name, remote.patience = url, "mine", QUICK
    with pytest.raises(ValueError, match=r"did not answer for 0.5 s \(.*refused"):
        remote.start(*group)()
    with pytest.raises(ValueError, match=r"did not answer for 0.5 s"):
        build_rewards([url], patience=QUICK)


def test_what_is_no_reward_is_not_taken_for_one():
    with (
        answering(lambda handler: None, kind="funny") as url,
        pytest.raises(ValueError, match="no reward answers there, but"),
    ):
        build_rewards([url], patience=QUICK)
    for url in ("http://:x/score", "http:///score", "http://a:99999/", "http://[::1/", "http://a..b/", "http://a b/"):
        with pytest.raises(ValueError, match=f"{re.escape(url)} is not the address of a reward"):
            build_rewards([url])  # at once


def test_a_function_may_see_the_whole_group(group, tmp_path, monkeypatch):
    (tmp_path / "whole.py").write_text(
        "def rank(samples, target):\n    errors = (samples - target).square().mean((1, 2, 3))\n"
        "    return -errors.argsort().argsort().float()\nrank.groupwise = True\nrank.kind = 'fidelity'\n"
        "def short(samples, target):\n    return samples[:-1].mean((1, 2, 3))\nshort.groupwise = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rank, short = build_rewards(["whole:rank", "whole:short"])
    got = rank.score(*group, None)
    assert rank.kind == "fidelity" and got.sort(dim=1).values.tolist() == [[-2, -1, 0]] * B
    with pytest.raises(ValueError, match=r"reward 'whole:short': it must return one number per sample .*\[3\]; got"):
        short.score(*group, None)
    with serving("whole:rank") as url:
        assert torch.equal(build_rewards([f"{url}/whole:rank"])[0].score(*group, None), got)


SHORT = ("--train_batch_size=2", "--checkpointing_steps=1", "--validation_images=0")


def test_a_remote_reward_is_computed_beside_encoding_and_the_reference(crops, trained, tmp_path, monkeypatch):
    """And a run with it ends at the bytes of one that computes it itself."""
    common = [*GDPO, f"--data.folder={crops}", f"--model.pretrained={trained}", *SHORT, "--max_train_steps=2"]
    train_here(monkeypatch, *common, f"--output_dir={tmp_path / 'here'}")
    events = []
    start, predict = RemoteReward.start, Method._predict

    def noted(self, *pictures):
        events.append("start")
        waiting = start(self, *pictures)
        return lambda: (events.append("wait"), waiting())[1]

    monkeypatch.setattr(RemoteReward, "start", noted)
    monkeypatch.setattr(Method, "_predict", lambda *a: (events.append("predict"), predict(*a))[1])
    with serving("naturalness") as url:
        remote = [*common, f"--reward_funcs=[psnr_y,'{url}']"]
        train_here(monkeypatch, *remote, f"--output_dir={tmp_path / 'there'}")
        assert events == ["start", "predict", "wait"] * 2
        events.clear()
        train_here(monkeypatch, *remote, f"--output_dir={tmp_path / 'pairs'}", "--algorithm=dp2o", "--num_pairs=1")
        assert events == ["start", "wait", "predict"] * 2  # which samples are predicted depends on the rewards
    assert tree_bytes(tmp_path / "here" / "model") == tree_bytes(tmp_path / "there" / "model")


def test_a_server_that_dies_for_good_ends_the_run_saved(crops, trained, tmp_path, monkeypatch):
    calls = []

    def dies(handler):
        calls.append(0)
        alive = len(calls) < 3
        handler.give(save({"scores": torch.arange(6.0).view(2, 3)}) if alive else b"", 200 if alive else 503)

    common = [*GDPO, f"--data.folder={crops}", f"--model.pretrained={trained}", f"--output_dir={tmp_path / 'run'}"]
    common += ["--train_batch_size=2", "--checkpointing_steps=100", "--validation_images=0", "--max_train_steps=9"]
    lost = r"at step 3, samples .*: reward 'mine': .* did not answer for 0.3 s .*503"
    saved = r"The steps before it are saved .*checkpoint-0000002.*--resume_from_checkpoint latest"
    with answering(dies) as url, pytest.raises(RuntimeError, match=f"{lost}.*{saved}"):
        train_here(monkeypatch, *common, f"--reward_funcs=[psnr_y,'{url}']", "--reward_patience=0.3")
    assert (tmp_path / "run" / "checkpoint-0000002" / "manifest.json").is_file()


def test_a_server_that_dies_while_a_sheet_is_drawn_ends_the_run_saved(crops, trained, tmp_path, monkeypatch):
    calls = []

    def dies(handler):
        calls.append(0)
        alive = len(calls) < 3  # two steps; the third call is the sheet's
        handler.give(save({"scores": torch.arange(6.0).view(2, 3)}) if alive else b"", 200 if alive else 503)

    common = [*GDPO, f"--data.folder={crops}", f"--model.pretrained={trained}", f"--output_dir={tmp_path / 'run'}"]
    common += ["--train_batch_size=2", "--checkpointing_steps=100", "--validation_steps=2", "--max_train_steps=9"]
    line = r"after step 2, on held-out pictures: reward 'mine': .*All steps are saved \(.*checkpoint-0000002\)"
    with answering(dies) as url, pytest.raises(RuntimeError, match=line):
        train_here(monkeypatch, *common, f"--reward_funcs=[psnr_y,'{url}']", "--reward_patience=0.3")
    assert (tmp_path / "run" / "checkpoint-0000002" / "manifest.json").is_file()


def test_a_run_that_waits_for_a_server_stops_when_asked(crops, trained, tmp_path, monkeypatch, capfd):
    calls = []

    def dies(handler):
        calls.append(0)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        alive = len(calls) < 3
        handler.give(save({"scores": torch.arange(6.0).view(2, 3)}) if alive else b"", 200 if alive else 503)

    common = [*GDPO, f"--data.folder={crops}", f"--model.pretrained={trained}", f"--output_dir={tmp_path / 'run'}"]
    common += ["--train_batch_size=2", "--checkpointing_steps=100", "--validation_images=0", "--max_train_steps=9"]
    with answering(dies) as url, pytest.raises(Terminated):
        train_here(monkeypatch, *common, f"--reward_funcs=[psnr_y,'{url}']", "--reward_patience=500")
    assert "did not answer before the run was to stop" in capfd.readouterr().err
    assert (tmp_path / "run" / "checkpoint-0000002" / "manifest.json").is_file() and not STOPPING.is_set()


def serve(port: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "gdpo.rewards", "serve", "naturalness", f"--port={port}"]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)


def kills_of_both_sides(crops: Path, trained: Path, tmp_path: Path, kills: int, steps: int) -> int:
    """SIGKILL the run, and the server of its reward every other time; the end must be byte-equal to a straight run."""
    port = free_port()
    common = [*GDPO, f"--data.folder={crops}", f"--model.pretrained={trained}", *SHORT, f"--max_train_steps={steps}"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train(*common, f"--output_dir={straight}")
    common += [f"--reward_funcs=[psnr_y,'http://127.0.0.1:{port}/score/naturalness']"]
    common += [f"--output_dir={killed}", "--resume_from_checkpoint=auto"]
    server, rng, hit = serve(port), random.Random(0), 0
    try:
        for k in range(kills):
            process = start(*common)
            wait_for_rows(process, killed, 1 + (k + 1) * (steps - 2) // (kills + 1))
            if k % 2 == 0:
                server.kill()  # while the run asks it
                server.wait()
                server = serve(port)
            time.sleep(rng.random() * 0.3)
            if process.poll() is None:
                process.kill()
                hit += 1
            process.communicate()
        done = train(*common)
        assert re.search(r"resumed from .*checkpoint-", done.stderr)
    finally:
        server.kill()
        server.wait()
    assert tree_bytes(straight / "model") == tree_bytes(killed / "model")
    rows = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, steps + 1))
    return hit


@pytest.mark.slow
def test_kills_of_run_and_server_change_no_byte(crops, trained, tmp_path):
    assert kills_of_both_sides(crops, trained, tmp_path, kills=1, steps=6) == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_with_a_remote_reward(crops, trained, tmp_path):
    hit = kills_of_both_sides(crops, trained, tmp_path, kills=20, steps=100)
    print(f"\n{hit} SIGKILLs hit the run, ten its server; the model equals that of a run that was never killed")
    assert hit == 20
