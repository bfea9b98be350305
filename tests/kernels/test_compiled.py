"""Every kernel, as it is launched, compiled for A100, H100 and B200 on this machine, with or without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]

# Registers a thread, at most. 128 keeps 512 threads on a multiprocessor.
REGISTERS = {
    "_gdpo_loss_fwd_kernel": 128,
    "_gdpo_loss_reduce_kernel": 96,
    "_gdpo_loss_bwd_kernel": 64,
    "_attribute_statistics_fwd_kernel": 128,
    "_attribute_statistics_reduce_kernel": 64,
    "_complexity_fwd_kernel": 128,
    "_ratios_fwd_kernel": 64,
    "_attribute_reward_fwd_kernel": 64,
    "_geglu_fwd_kernel": 64,
    "_geglu_bwd_kernel": 96,
    "_group_norm_small_kernel": 128,
    "_group_norm_partial_kernel": 112,
    "_group_norm_reduce_kernel": 64,
    "_group_norm_apply_kernel": 80,
    "_group_norm_partial_bwd_kernel": 128,
    "_group_norm_reduce_bwd_kernel": 64,
    "_group_norm_apply_bwd_kernel": 128,
}
STREAMING = {"_gdpo_loss_fwd_kernel", "_gdpo_loss_bwd_kernel", "_attribute_statistics_fwd_kernel"}


@pytest.mark.parametrize(
    ("capability", "few"),
    [(80, ["few"]), *(pytest.param(capability, [], marks=pytest.mark.slow) for capability in (80, 90, 100))],
    ids=["80-few", "80", "90", "100"],
)
def test_kernels_compile_without_spills_and_with_wide_loads(capability, few, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.aot", str(capability), *few],
        cwd=ROOT, capture_output=True, text=True, timeout=500,
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == REGISTERS.keys()
    for row in rows:
        assert row["cubin_bytes"] > 0
        assert row["spilled_bytes"] == 0, row
        assert row["registers"] <= REGISTERS[row["kernel"]], row
    wide = [row for row in rows if row["kernel"] in STREAMING and row["variant"].startswith(("training", "large"))]
    sizes_and_types = 6 if capability == 90 else 3  # elsewhere fp32 in both sizes, fp16 in the large one
    assert len(wide) == sizes_and_types * len(STREAMING)
    for row in wide:
        if "loss" in row["kernel"]:  # all elements; the rest are scalars of the sample
            tensors = 3 if "fwd" in row["kernel"] else 2
            assert row["loads_128bit"] >= tensors and row["loads"] - row["loads_128bit"] <= 3, row
            assert ("bwd" not in row["kernel"]) or row["stores_128bit"] >= 1, row
        else:  # three channels, here and in the row below, of the target and of the samples; 1 in 4 columns apart
            assert row["loads_128bit"] >= 12 and row["loads"] <= 40, row
    norms = [row for row in rows if row["variant"].startswith(("vae", "unet large")) and "small" not in row["kernel"]]
    assert len(norms) == (10 if capability == 90 else 8)
    for row in norms:
        if "reduce" not in row["kernel"]:  # every element of the features; nothing else is as large
            assert row["loads_128bit"] >= 2 and row["loads"] == row["loads_128bit"], row
            assert "apply" not in row["kernel"] or row["stores_128bit"] >= 2, row


@pytest.mark.slow
def test_the_real_models_have_no_other_normalisations():
    script = "from tests.support import aot; assert aot.real_norms() == {k: set(v) for k, v in aot.NORMS.items()}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
