"""The kernel benchmark runs at miniature size, and refuses figures on a dirty tree, red tests or wrong results."""

import contextlib
import sys

import pytest
import torch

from benchmarks import kernel_bench, kernel_cases
from engine.io import rows
from tests.support import commands


def test_dry_run_measures_every_operation_and_writes_nothing():
    path = rows.RESULTS / "kernels.jsonl"
    before = path.read_bytes() if path.exists() else None
    options = ["--dry_run", "true", "--compile", "false", "--seconds", "0.01"]
    no_gpu = {"CUDA_VISIBLE_DEVICES": ""} if torch.cuda.is_available() else {}
    done = commands.run("benchmarks.kernel_bench", *options, **no_gpu)
    assert done.returncode == 0, done.stderr
    for op in kernel_bench.CASES:
        assert f"{op} " in done.stdout
    assert all(f" {word} " in done.stdout for word in ("forward", "backward", "both", "eager", "opencv"))
    assert (path.read_bytes() if path.exists() else None) == before


def test_unknown_operation(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kernel_bench", "--ops", "[sobel]"])
    with pytest.raises(ValueError, match="unknown operation sobel; there are gdpo_loss"):
        kernel_bench.main()


def test_a_dirty_tree_gives_no_figure(monkeypatch):
    monkeypatch.setattr(rows, "commit", lambda: ("0123456789abcdef", True))
    monkeypatch.setattr(sys, "argv", ["kernel_bench"])
    with pytest.raises(RuntimeError, match="commit first"):
        kernel_bench.main()


def test_red_tests_give_no_figure(monkeypatch, tmp_path):
    folder = tmp_path / "tests" / "kernels"
    folder.mkdir(parents=True)
    (folder / "test_loss.py").write_text("def test_it():\n    assert False\n")
    (folder / "test_reward.py").write_text("def test_it():\n    pass\n")
    monkeypatch.setattr(kernel_bench, "ROOT", tmp_path)
    kernel_bench.gate("attribute_reward", "cpu")
    with pytest.raises(RuntimeError, match="the tests of gdpo_loss are not green"):
        kernel_bench.gate("gdpo_loss", "cpu")


def test_every_case_is_compiled(monkeypatch):
    """They share one line of code, of which torch.compile keeps eight results and leaves the rest eager."""
    compiled, graphs = torch.compile, []

    def counted(call, dynamic):
        return compiled(call, dynamic=dynamic, backend=lambda graph, _: graphs.append(graph) or graph.forward)

    monkeypatch.setattr(torch, "compile", counted)
    for n in range(2, 12):
        case = kernel_cases.reward_case((2, n, 1, 2), torch.float32, "cpu")
        calls, before = dict(kernel_bench.implementations(case, "cpu", compiled=True)), len(graphs)
        torch.testing.assert_close(calls["compile"](), calls["eager"]())
        assert len(graphs) > before


def test_the_copy_is_of_random_data_that_no_cache_holds(monkeypatch):
    made, randint = [], torch.randint
    monkeypatch.setattr(torch, "randint", lambda *args, **named: made.append(randint(*args, **named)) or made[-1])
    assert kernel_bench.copy_bandwidth("cpu", 1 << 16) > 0
    assert len(made) == 1 and len(made[0].unique()) == 256 and kernel_bench.COPIED["cuda"] > 2 << 30


def test_a_small_operation_is_timed_by_a_recorded_graph_too(monkeypatch):
    class Event:
        def record(self):
            self.calls = len(calls)

        def elapsed_time(self, later):
            return 2.0 * (later.calls - self.calls)  # 2 ms a call

    class Graph:
        def replay(self):
            calls.extend([None] * kernel_bench.REPLAYED)

    calls: list[None] = []
    named = {"Event": lambda **_: Event(), "CUDAGraph": Graph, "synchronize": lambda: None}
    for name, stand_in in (named | {"graph": lambda graph: contextlib.nullcontext()}).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    assert kernel_bench.replayed(lambda: calls.append(None)) == 2.0

    def refused():
        raise RuntimeError("operation not permitted when stream is capturing")

    assert kernel_bench.replayed(refused) is None


def test_a_wrong_result_gives_no_figure():
    case = kernel_cases.reward_case((2, 3, 1, 2), torch.float32, "cpu")
    right = case.call
    case.extra = {"wrong": lambda: right("torch") * 1.1}
    clock = kernel_bench.Clock("cpu", 0.001)
    with pytest.raises(RuntimeError, match=r"attribute_reward wrong at .* is wrong"):
        list(kernel_bench.measure(case, "cpu", clock, 1e9, compiled=False))


def test_what_fails_costs_its_own_figures(monkeypatch, capsys):
    def broken(size, dtype, device):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nAdvice")

    monkeypatch.setitem(kernel_bench.CASES, "attribute_reward", broken)
    options = ["--ops", "[attribute_reward,group_norm]", "--dry_run", "true", "--compile", "false", "--seconds", "0.01"]
    monkeypatch.setattr(sys, "argv", ["kernel_bench", *options])
    assert kernel_bench.main() == 1
    shown = capsys.readouterr()
    assert shown.err == "no figure: attribute_reward, 2x3x1x2, torch.float32: CUDA out of memory. Advice\n"
    assert "group_norm " in shown.out and "attribute_reward " not in shown.out
