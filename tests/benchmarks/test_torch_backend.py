"""The ladder of the torch backend in miniature: every step is measured, a wrong one has no figure, FLOP are right."""

import re

import pytest
import torch

from benchmarks import torch_backend
from engine.export import torch_backend as backend
from engine.export.optimise import Steps
from engine.io import rows
from gdpo.generator import OneStepGenerator
from gdpo.model.codecs import KLCodec
from gdpo.model.diffusers_patches import FusedGroupNorm
from gdpo.model.random_folder import architecture

pytestmark = pytest.mark.slow  # minutes: the benchmark in miniature, many times


def steps_shown(text):
    return [line[:16].strip() for line in text.splitlines() if re.search(r"e-\d\d$", line)]


def test_the_dry_run_shows_every_step_and_writes_no_rows(mini_sd, capsys):
    before = {p: p.read_bytes() for p in rows.RESULTS.glob("*")}
    bench = torch_backend.measure(mini_sd, [64], [1, 2], dry=True)
    assert not bench.refused
    shown = steps_shown(capsys.readouterr().out)
    assert shown == [*list(torch_backend.LADDER)[:-1], "eager fp16", "CUDA graph"]
    assert {p: p.read_bytes() for p in rows.RESULTS.glob("*")} == before


def test_a_wrong_result_has_no_figure(mini_sd, capsys, monkeypatch):
    made = torch_backend.Bench.session

    def broken(self, steps):
        session = made(self, steps)
        for module in session.module.modules():
            if isinstance(module, FusedGroupNorm):
                module.silu = False
        return session

    monkeypatch.setattr(torch_backend.Bench, "session", broken)
    bench = torch_backend.measure(mini_sd, [64], [1], dry=True)
    assert [line.partition(", batch 1: ")[0] for line in bench.refused] == ["fused norms, 64x64", "CUDA graph, 64x64"]
    assert all("relative L2" in line for line in bench.refused)
    assert steps_shown(capsys.readouterr().out) == list(torch_backend.LADDER)[:5]


def test_the_compiled_step_is_a_run_of_its_own(mini_sd, capsys, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, dynamic: compiled.append(self))  # takes a minute
    compiled: list = []
    assert not torch_backend.measure(mini_sd, [64], [1], dry=True, compiled=True).refused
    assert steps_shown(capsys.readouterr().out) == ["CUDA graph", "compiled"] and len(compiled) == 1


def test_the_ends_alone(mini_sd, capsys):
    assert not torch_backend.measure(mini_sd, [64], [1, 2], dry=True, ends=True).refused
    assert steps_shown(capsys.readouterr().out) == ["eager fp16", "CUDA graph"] * 2


def test_no_time_means_no_figures_and_a_word_about_it(mini_sd, capsys):
    bench = torch_backend.measure(mini_sd, [64, 128], [1, 2], dry=True, seconds=1e-9)
    assert not steps_shown(capsys.readouterr().out)
    assert bench.refused == ["4 shapes were not begun within 1e-09 s"]


def test_what_a_library_refuses_costs_one_contender(mini_sd, capsys, monkeypatch):
    right = torch_backend.error_of

    def refused(run, *rest):
        if run.steps == torch_backend.LADDER["bf16"]:
            raise RuntimeError("cuDNN Frontend error:\nno plan")
        if run.steps == torch_backend.LADDER["folded"]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Advice")
        return right(run, *rest)

    monkeypatch.setattr(torch_backend, "error_of", refused)
    monkeypatch.setattr("sys.argv", ["x", "--folder", str(mini_sd), "--pictures", "64", "--batches", "1", "--dry"])
    assert torch_backend.main() == 1
    shown = capsys.readouterr()
    assert steps_shown(shown.out) == [n for n in list(torch_backend.LADDER)[:-1] if n not in ("bf16", "folded")]
    refusals = [line for line in shown.err.splitlines() if line.startswith("no figure: ")]
    assert refusals == [
        "no figure: bf16, 64x64, batch 1: cuDNN Frontend error: no plan",
        "no figure: folded, 64x64, batch 1: out of memory",
    ]


def test_a_failure_of_the_definition_or_while_timing_costs_no_other_figure(mini_sd, capsys, monkeypatch):
    timed, ran = torch_backend.seconds_of, backend.TorchSession.run

    def fails(run, *rest):
        if run.steps == torch_backend.LADDER["bf16"]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Advice")
        return timed(run, *rest)

    def no_room(self, image, noise):
        if self.steps == torch_backend.DEFINITION and image.shape[-1] == 128:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Advice")
        return ran(self, image, noise)

    monkeypatch.setattr(torch_backend, "seconds_of", fails)
    monkeypatch.setattr(backend.TorchSession, "run", no_room)
    bench = torch_backend.measure(mini_sd, [64, 128], [1], dry=True)
    full = "128x128, batch 1: out of memory"
    assert bench.refused == ["bf16, 64x64, batch 1: out of memory", f"the definition in fp32, {full}"]
    assert steps_shown(capsys.readouterr().out) == [n for n in list(torch_backend.LADDER)[:-1] if n != "bf16"]


def test_called_again_it_goes_on_where_it_was(monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    assert torch_backend.measured("m", "eager fp16") == set()
    rows.append_row("torch_backend", model="m", step="eager fp16", side=64, batch=1)
    rows.append_row("torch_backend", model="m", step="CUDA graph", side=64, batch=2)
    rows.append_row("torch_backend", model="other", step="eager fp16", side=64, batch=4)
    assert torch_backend.measured("m", "eager fp16") == {(64, 1)}
    monkeypatch.setattr(rows, "commit", lambda: ("another", False))
    assert torch_backend.measured("m", "eager fp16") == set()


def test_bad_input(mini_sd):
    with pytest.raises(ValueError, match="pictures must be multiples of 64; got 100"):
        torch_backend.measure(mini_sd, [100], [1], dry=True)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"no NVIDIA GPU|differs from commit|no git checkout"):
            torch_backend.measure(mini_sd, [64], [1])


def test_the_floor_counts_stable_diffusions_operations():
    """2.217 TMAC for 512x512, counted by hand from the layers: VAE encoder 0.558, UNet 0.402, VAE decoder 1.257."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    shape = architecture("sd21")
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**shape["unet"]), AutoencoderKL(**shape["vae"])
        embeds = torch.empty(1, 77, 1024)
    generator = OneStepGenerator(unet, KLCodec(vae), prompt_embeds=embeds)
    assert torch_backend.flop(generator, 512) / 2e12 == pytest.approx(2.217, rel=0.01)


def test_graphs_that_live_share_no_stream_and_a_dead_pool_is_not_taken_up(mini_sd, monkeypatch):
    """torch asserts the second, and with the first one graph's end takes the workspace of the others' products."""
    made = torch_backend.from_generator(OneStepGenerator.from_pretrained(mini_sd), steps=Steps(folded=True))[1]
    seen: list[tuple[int, str]] = []

    class Recorded:
        def __init__(self, module, inputs, pool, stream):
            self.run, self.pool, self.stream = module, pool, stream
            seen.append((pool, stream))

        def __call__(self, *inputs):
            return self.run(*inputs)

    pools = iter(range(100))
    monkeypatch.setattr(backend, "Recorded", Recorded)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    made.steps, made.device = Steps(folded=True, graphs=True), torch.device("cuda")  # run() asks no more of it
    made._streams = list("abcd")
    made.module = lambda image, noise: image

    def run(side):
        made.run(torch.zeros(1, 3, side, side), torch.zeros(1, 4, side // 8, side // 8))

    for side in (64, 128, 192, 256, 320, 384, 64):
        for _ in range(2):
            run(side)
        live = [r for r in made._shapes.values() if r]
        assert len({r.stream for r in live}) == len(live) <= backend.KEPT_SHAPES
        assert {r.pool for r in live} == {0}
    assert len(seen) == 7
    made.forget()
    for _ in range(2):
        run(64)
    assert seen[-1] == (1, "a")


def test_no_attention_reads_a_batch_with_a_stride_of_0(mini_sd, monkeypatch):
    generator = OneStepGenerator.from_pretrained(mini_sd)
    run = torch_backend.from_generator(generator, steps=Steps(folded=True, attention=True))[1]
    attention, strides = torch.nn.functional.scaled_dot_product_attention, []

    def look(*tensors, **options):
        strides.extend(t.stride(0) for t in tensors)
        return attention(*tensors, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", look)
    run.run(torch.zeros(2, 3, 64, 64), torch.zeros(2, 4, 8, 8))
    assert len(strides) > 30 and 0 not in strides
