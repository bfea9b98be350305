"""`python -m engine.bench` on the tiny model: its rows, their sums, its plot."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from engine import bench
from engine.io import cli, rows


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.run(bench.main)
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_rows_name_every_contender_batch_and_stage(tiny_model, tiny_split_engine, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    peak = bench.peak_mib
    monkeypatch.setattr(bench, "peak_mib", lambda name, *a: peak(name, *a) if name == "onnxruntime" else 0.0)
    arguments = [
        "--engine",
        tiny_split_engine,
        "--contenders",
        "torch",
        "onnxruntime",
        "--sizes",
        64,
        "--batches",
        1,
        2,
    ]
    code, out, _ = run(monkeypatch, capsys, tiny_model, *arguments, "--rounds", 3, "--threads", 1)
    found = [json.loads(line) for line in (tmp_path / "engine.jsonl").read_text().splitlines()]
    assert code == 0 and len(out.splitlines()) == len(found)
    (folding,) = [r for r in found if r["what"] == "folding"]
    assert folding["folded_nodes"] < folding["plain_nodes"] and folding["folded_mib"] < folding["plain_mib"]
    assert folding["folded_p50_ms"] > 0 and folding["plain_p50_ms"] > 0
    latency = {(r["contender"], r["batch"]): r for r in found if r["what"] == "latency"}
    assert set(latency) == {(c, b) for c in ("torch", "onnxruntime") for b in (1, 2)}
    for (name, batch), row in latency.items():
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["pictures_per_s"] == pytest.approx(batch * 1e3 / row["p50_ms"])
        assert (row["peak_mib"] > 50) == (name == "onnxruntime")
    (stages,) = [r for r in found if r["what"] == "stages"]
    shares = {key: value for key, value in stages.items() if key.endswith("_share")}
    assert {"encoder_share", "unet_share", "decoder_share", "resample_share", "write_png_share"} <= set(shares)
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0
    with Image.open(tmp_path / "engine.png") as plot:
        assert np.asarray(plot.convert("L")).std() > 5  # something is drawn


def test_batches_and_contenders_take_turns():
    calls = []
    times = bench.measure({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3, warmup=1)
    assert "".join(calls) == "ab" + "ababab" and {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}


def test_what_cannot_run_here_is_left_out_by_name(tiny_engine, tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(bench, "folding", lambda *a: {"what": "folding"})
    monkeypatch.setattr(bench, "peak_mib", lambda *a: 1.0)
    monkeypatch.setitem(sys.modules, "openvino", None)
    arguments = ["--engine", tiny_engine, "--contenders", "onnxruntime", "openvino", "--sizes", 64, "--batches", 1]
    code, out, err = run(monkeypatch, capsys, tiny_model, *arguments, "--rounds", 1, "--no-rows")
    assert code == 0 and "openvino: left out (backend openvino is not installed here" in err
    assert "contender onnxruntime" in out and "contender openvino" not in out


def test_a_side_or_batch_that_the_model_does_not_take_is_one_line(tiny_engine, tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(bench, "folding", lambda *a: pytest.fail("began to work"))
    for arguments, message in (
        (["--sizes", 100], "multiples of 16 from 64 to 1024; got 100"),
        (["--batches", 0], "batches must be 1 to 8 for this model; got 0"),
        (["--rounds", 0], "rounds must be at least 1; got 0"),
    ):
        code, _, err = run(monkeypatch, capsys, tiny_model, "--engine", tiny_engine, *arguments, "--no-rows")
        assert code == 2 and message in err and err.count("\n") == 1
