"""Exports: parity with torch, folded constants, dynamic axes, and the self-contained graph."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from engine import Upscaler
from engine.build.weights import widened
from engine.export import graphs
from engine.export import parity as parity_check
from engine.export.__main__ import main
from engine.export.descriptors import geometry_of, profile_of
from engine.export.generator import export_generator
from engine.export.weights import round_to, store_as
from engine.io import cli
from engine.runtime import manifest as manifests
from engine.runtime.manifest import FolderError, Profile
from gdpo.generator import OneStepGenerator
from gdpo.model import lora

SMALL = Profile((1, 1, 1), (64, 64, 64))


@pytest.mark.parametrize(
    "name", ["tiny_engine", "tiny_split_engine", pytest.param("mini_dynamic_engine", marks=pytest.mark.slow)]
)
def test_the_parity_check_ran_over_six_shapes_and_batches_1_to_4(name, request):
    manifest = manifests.load(request.getfixturevalue(name))
    parity = manifest.parity
    assert len(parity["shapes"]) == 6 and {s[0] for s in parity["shapes"]} == {1, 2, 3, 4}
    assert 0 < parity["max_abs"] < 2e-4
    tensors = [t for g in manifest.graphs.values() for t in (*g.inputs, g.output)]
    assert all(t.shape[0] == "batch" and isinstance(t.shape[2], str) for t in tensors)


@pytest.mark.parametrize("batch, rows, columns", [(1, 3, 1), (4, 1, 2), (3, 2, 2)])
def test_onnx_runtime_is_torch_on_shapes_that_the_export_did_not_see(tiny_engine, tiny_model, batch, rows, columns):
    random = torch.Generator().manual_seed(9)
    image = torch.rand((batch, 3, 64 * rows + 16, 64 * columns), generator=random) * 2 - 1
    noise = torch.randn((batch, 48, 16 * rows + 4, 16 * columns), generator=random)
    generator = OneStepGenerator.from_pretrained(tiny_model)
    with torch.no_grad():
        expected = generator.codec.decode(generator.predict(generator.encode(image), noise).x0).numpy()
    ours = Upscaler.load(tiny_engine).sessions["generator"]({"image": image.numpy(), "noise": noise.numpy()})
    assert np.abs(ours - expected).max() < 2e-4
    assert np.abs(expected - image.numpy()).mean() > 0.01  # the step is not the identity


def test_a_fault_in_the_export_is_found_and_nothing_is_kept(tiny_model, tmp_path, monkeypatch):
    correct = graphs.fold

    def faulty(generator):
        correct(generator)
        with torch.no_grad():
            generator.unet.conv_in.bias[0] += 0.01
        return generator

    monkeypatch.setattr(graphs, "fold", faulty)
    with pytest.raises(RuntimeError, match="the export differs from torch by"):
        export_generator(OneStepGenerator.from_pretrained(tiny_model), tmp_path / "out", profile=SMALL)
    assert not list(tmp_path.iterdir())


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


def shapes(path):
    return [tuple(i.dims) for i in onnx.load(path).graph.initializer]


def test_nothing_is_left_of_text_and_time(mini_engine, mini_model, tiny_engine, tiny_model):
    """No text encoder, no projections of the prompt, no time-embedding perceptron."""
    generator = OneStepGenerator.from_pretrained(mini_model)
    sizes = {n: p.numel() for n, p in generator.unet.named_parameters()}
    gone = sum(v for n, v in sizes.items() if "time_emb" in n or "attn2.to_k" in n or "attn2.to_v" in n)
    length = generator.text_embeds(1).shape[1]
    widths = [p.shape[0] for n, p in generator.unet.named_parameters() if "attn2.to_k" in n]
    constants = sum(2 * length * width for width in widths)  # keys and values
    grown = sum(7 * v // 9 for n, v in sizes.items() if "upsamplers" in n and n.endswith("weight"))  # 3x3 to four 2x2
    left = sum(int(np.prod(s)) for s in shapes(mini_engine / "unet.onnx"))
    assert gone > 10_000 and left <= sum(sizes.values()) - gone + constants + grown + 1000
    inputs = [i.name for i in onnx.load(mini_engine / "unet.onnx").graph.input]
    assert inputs == ["latent", "noise"]
    tiny = OneStepGenerator.from_pretrained(tiny_model)
    folded = sum(int(np.prod(s)) for s in shapes(tiny_engine / "generator.onnx"))
    time = sum(p.numel() for n, p in tiny.unet.named_parameters() if "time" in n)
    assert folded < sum(p.numel() for p in tiny.unet.parameters()) - time + 100
    assert not {"Sin", "Cos", "Gemm", "MatMul"} & set(operators(tiny_engine / "generator.onnx"))


def test_upsampling_and_padding_are_inside_the_convolutions(mini_engine):
    found = {name: operators(mini_engine / f"{name}.onnx") for name in ("encoder", "unet", "decoder")}
    assert not {"Resize", "Pad"} & {operator for graph in found.values() for operator in graph}
    assert "Conv" in found["decoder"] and "ConvTranspose" not in found["decoder"]


def test_folding_changes_no_picture(mini_model):
    generator = OneStepGenerator.from_pretrained(mini_model)
    image = torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1
    noise = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = generator.codec.decode(generator.predict(generator.encode(image), noise).x0)
        folded = graphs.Whole(graphs.fold(generator), "fp32")(image, noise)
    assert (folded - expected).abs().max() < 1e-4


def test_lora_is_merged(tiny_model):
    generator = OneStepGenerator.from_pretrained(tiny_model)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    noise = torch.randn(1, 48, 16, 16, generator=torch.Generator().manual_seed(2))

    def result():
        return generator.codec.decode(generator.predict(generator.encode(image), noise).x0)

    with torch.no_grad():
        base = result()
        lora.add(generator.unet, 2, r".*(conv1|conv_in|ups\.0)")
        for name, parameter in generator.unet.named_parameters():
            if "lora" in name:
                parameter.add_(0.05)
        tuned = result()
        folded = graphs.Whole(graphs.fold(generator), "fp32")(image, noise)
    assert (tuned - base).abs().max() > 1e-3 and (folded - tuned).abs().max() < 1e-4


def test_fp16_keeps_its_ends_fp32_and_its_up_blocks_wide(tiny_model, mini_model, tmp_path):
    manifest = export_generator(
        OneStepGenerator.from_pretrained(tiny_model), tmp_path / "half", precision="fp16", profile=SMALL
    )
    assert 2e-6 < manifest.parity["max_abs"] < 0.1
    graph = onnx.load(tmp_path / "half" / "generator.onnx").graph
    assert {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    kinds = {i.data_type for i in graph.initializer if len(i.dims) == 4}
    assert kinds == {onnx.TensorProto.FLOAT16}
    generator = graphs.cast(OneStepGenerator.from_pretrained(mini_model), "fp16")
    decoder = generator.vae.decoder
    assert {p.dtype for p in decoder.up_blocks.parameters()} == {torch.float32}
    assert {p.dtype for p in decoder.mid_block.parameters()} == {torch.float16}
    with torch.no_grad():
        assert torch.isfinite(graphs.Decoder(generator, "fp16")(torch.randn(1, 4, 8, 8))).all()


@pytest.mark.parametrize("weights, kind, narrower", [("fp16", "FLOAT16", 2), ("int8", "INT8", 3)])
def test_narrow_weights_are_those_that_torch_has(tiny_model, tiny_engine, tmp_path, weights, kind, narrower):
    narrow = export_generator(
        OneStepGenerator.from_pretrained(tiny_model), tmp_path / "narrow", profile=SMALL, weights=weights
    )
    assert narrow.options["weights"] == weights and narrow.parity["max_abs"] < 2e-4
    sizes = [(folder / "generator.onnx").stat().st_size for folder in (tmp_path / "narrow", tiny_engine)]
    saved = narrower * narrow.model["parameters"]  # bytes
    assert 0.4 * saved < sizes[1] - sizes[0] < saved  # small tensors stay
    stored = onnx.load(tmp_path / "narrow" / "generator.onnx")
    wide = widened(onnx.load(tmp_path / "narrow" / "generator.onnx"))
    inputs = {
        "image": np.random.default_rng(0).random((1, 3, 64, 64), np.float32),
        "noise": np.random.default_rng(1).standard_normal((1, 48, 16, 16), np.float32),
    }
    pictures = [
        onnxruntime.InferenceSession(model.SerializeToString()).run(None, inputs)[0] for model in (stored, wide)
    ]
    assert np.array_equal(*pictures)
    content = (tmp_path / "narrow" / "generator.onnx").read_bytes()
    assert not any(note in content for note in (b"pkg.", b'File "', bytes(Path(__file__).parents[2])))
    narrow_ones = [t for t in stored.graph.initializer if t.data_type == getattr(onnx.TensorProto, kind)]
    assert narrow_ones and not any(t.data_type == narrow_ones[0].data_type for t in wide.graph.initializer)


def test_a_matrix_that_the_exporter_turns_is_stored_too(tmp_path):
    layer = torch.nn.Linear(48, 40)
    round_to("int8", layer)
    for weight in (layer.weight, layer.weight.T):
        node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
        x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, None]) for n in "xy")
        stored = onnx.numpy_helper.from_array(weight.detach().numpy().copy(), "w")
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y], [stored])), tmp_path / "m.onnx")
        store_as("int8", tmp_path / "m.onnx")
        assert onnx.load(tmp_path / "m.onnx").graph.initializer[0].data_type == onnx.TensorProto.INT8


@pytest.mark.parametrize("kernel, axes", [(3, (2, 3)), (1, (1, 2, 3))])
def test_int8_weights_have_255_levels_for_each_kernel_or_channel(kernel, axes):
    layer = torch.nn.Conv2d(48, 6, kernel)
    before = layer.weight.detach() * torch.logspace(-12, 3, 6)[:, None, None, None]
    before[2] = 0  # a channel without weights
    layer.weight.data.copy_(before)
    round_to("int8", layer)
    step = before.abs().amax(axes, keepdim=True) / 127
    assert ((layer.weight - before).abs() <= 0.76 * step).all()  # a quarter is the scale's
    assert (layer.weight[2] == 0).all()
    weight = layer.weight.detach().double()
    levels = weight / (weight.abs().amax(axes, keepdim=True) / 127).clamp_min(1e-40)
    assert torch.equal(levels, levels.round())
    layer.weight.data[0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="weight holds a number that is not finite"):
        round_to("int8", layer)


def test_the_self_contained_graph_upscales_odd_pictures(tiny_engine, photo):
    session = onnxruntime.InferenceSession(tiny_engine / "image_to_image.onnx", providers=["CPUExecutionProvider"])
    up = Upscaler.load(tiny_engine)
    for height, width in ((37, 50), (64, 64), (2, 3)):
        rgb = np.ascontiguousarray(photo[:height, :width])
        picture = rgb.astype(np.float32).transpose(2, 0, 1)[None] / 255
        result = session.run(None, {"input": picture})[0][0].transpose(1, 2, 0) * 255
        assert result.shape == (4 * height, 4 * width, 3)
        ours = up.upscale(rgb, seed=0, color="adain").astype(float)  # the alignment that is in the graph
        if min(height, width) > 8:  # the borders differ: there the convolution mirrors, the resampler renormalises
            inner = (slice(32, -32), slice(32, -32))
            assert np.abs(result - ours)[inner].mean() < 0.6


@pytest.mark.parametrize(
    "options, message",
    [
        ({"precision": "int8"}, "precision must be one of fp32, fp16, bf16"),
        ({"weights": "fp16", "precision": "bf16"}, "weights must be fp32, or fp16 or int8 in a graph"),
        ({"weights": "int4"}, "got 'int4' in fp32"),
        ({"opset": 9}, "opset must be 18 to 23"),
        ({"on_cpu": "fp16"}, "on_cpu must be fp32, or bf16 of a graph of precision fp32; got 'fp16' in fp32"),
        ({"on_cpu": "bf16", "precision": "fp16"}, "got 'bf16' in fp16"),
        ({"seed": -1}, r"seed must be in \[0, 2\^64\); got -1"),
    ],
)
def test_bad_options_are_named(tiny_model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export_generator(OneStepGenerator.from_pretrained(tiny_model), tmp_path / "x", **options)


def test_profiles_are_checked(tiny_model):
    geometry = geometry_of(OneStepGenerator.from_pretrained(tiny_model))
    sizes = {"batch": 1, "max_batch": 8, "tile": 512, "max_tile": 1024, "static": False}
    static = {"batch": 0, "static": True}
    for change, message in (
        ({"tile": 100}, "tile must be a multiple of 16"),
        ({"batch": 9}, "must not exceed"),
        ({"batch": 0}, "batch must be at least 1; got 0"),
        (static, "batch must be at least 1; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            profile_of(geometry, **sizes | change)


def test_a_folder_of_other_files_is_not_replaced(tiny_model, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(FolderError, match="will not be replaced"):
        export_generator(OneStepGenerator.from_pretrained(tiny_model), tmp_path, profile=SMALL)
    assert (tmp_path / "photo.jpg").read_bytes() == b"mine"


def test_the_command_exports(tiny_model, tmp_path, monkeypatch, capsys):
    arguments = [str(tiny_model), "--out", str(tmp_path / "out"), "--static", "--tile", "64", "--t-noise", "40"]
    monkeypatch.setattr(sys, "argv", ["export", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == 0 and "max_abs" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert content["model"]["t_noise"] == 40 and content["profile"]["tile"] == [64, 64, 64]
    up = Upscaler.load(tmp_path / "out")
    assert up.upscale(np.zeros((50, 20, 3), np.uint8)).shape == (200, 80, 3)  # in static tiles


def test_the_command_tells_an_engine_folder_from_a_generator(tiny_engine, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export", str(tiny_engine), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == 2 and "this is an engine folder, not a generator" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("exported", "torchs", "message"),
    [
        (float("nan"), 0.0, "the export gives values that are not finite"),
        (float("inf"), 0.0, "the export gives values that are not finite"),
        (float("nan"), float("nan"), "the model itself gives values that are not finite"),
    ],
)
def test_what_is_not_finite_is_no_parity(exported, torchs, message, monkeypatch):
    """A comparison with NaN is never true: the largest of NaN and 0 can be 0."""
    monkeypatch.setattr(parity_check.graphs, "Whole", lambda *_: lambda image, noise: torch.full_like(image, exported))
    image = torch.zeros(1, 3, 8, 8)
    cases = [([image, image], torch.full_like(image, torchs))]
    with pytest.raises(RuntimeError, match=message):
        parity_check.measure_parity(None, SimpleNamespace(precision="bf16"), Path("."), cases)
