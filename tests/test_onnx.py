"""torch.onnx.export: standard operators alone, and the same results under ONNX Runtime, for any batch."""

import warnings

import onnx
import onnxruntime
import pytest
import torch
from support import randomize
from test_fuse import ForeignUnit
from torch import nn

import shufflenet_ext as se


def foreign():
    return nn.Sequential(ForeignUnit(24, 24, 1, 3), ForeignUnit(24, 48, 2, 3))


def classifier():
    end = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(72, 5))
    return nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(), foreign(), end)


UNITS = {
    "own": lambda: se.FusedShuffleBottleneck(24, 24, 1, 3),
    "variant": lambda: se.FusedShuffleBottleneck(
        24, 48, 2, 3, mid_channels=12, bias=True, shuffle_groups=4, shortcut_first=True, shortcut_relu=False
    ),
    "foreign": lambda: se.fuse(foreign()),
}
IMAGES = torch.randn(2, 3, 17, 15)
MODELS = {
    "optimized": lambda: se.optimize_for_inference(randomize(classifier())),
    "captured": lambda: se.optimize_for_inference(randomize(classifier()), example_inputs=(IMAGES,)),
}


def exported(model, x, dynamo, path):
    """The ONNX model of a model, its batch free."""
    names = {"input_names": ["x"], "output_names": ["y"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what becomes of the exporters, and of what they trace
        if dynamo:
            torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, dynamic_shapes=({0: "n"},), **names)
        else:
            torch.onnx.export(model, (x,), path, dynamo=False, dynamic_axes={"x": {0: "n"}, "y": {0: "n"}}, **names)
    return onnx.load(path)


def assert_standard(graph, *, convolutions):
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    assert not graph.functions
    assert {entry.domain for entry in graph.opset_import} <= {"", "ai.onnx"}
    assert [node.op_type for node in graph.graph.node].count("Conv") == convolutions


def assert_equal_under_onnx_runtime(path, model, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for images in (x, torch.randn(5, *x.shape[1:])):
        (got,) = session.run(None, {"x": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(got), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("kind", UNITS)
def test_units(kind, dynamo, tmp_path):
    model, x, path = randomize(UNITS[kind]()).eval(), torch.randn(2, 24, 9, 7), str(tmp_path / "unit.onnx")
    assert_standard(exported(model, x, dynamo, path), convolutions=6 if kind == "foreign" else 3)
    assert_equal_under_onnx_runtime(path, model, x)


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_optimized_models(kind, dynamo, tmp_path):
    model, path = MODELS[kind](), str(tmp_path / "model.onnx")
    assert_standard(exported(model, IMAGES, dynamo, path), convolutions=7)
    assert_equal_under_onnx_runtime(path, model, IMAGES)


def test_exported_programs_and_channels_last(tmp_path):
    # A program that torch.export made has our ops, which the exporter takes apart.
    model = randomize(UNITS["own"]()).eval().to(memory_format=torch.channels_last)
    x, path = torch.randn(2, 24, 9, 7).to(memory_format=torch.channels_last), str(tmp_path / "unit.onnx")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    assert "shufflenet_ext" in str(program.graph)
    torch.onnx.export(program, (), path, dynamo=True, verbose=False, input_names=["x"])
    assert_standard(onnx.load(path), convolutions=3)
    assert_equal_under_onnx_runtime(path, model, x)


@pytest.mark.long
@pytest.mark.parametrize("optimize", [lambda net: net, se.optimize_for_inference])
def test_networks(optimize, tmp_path):
    net, x, path = randomize(se.models.shufflenet_v1(width=0.25)).eval(), torch.randn(2, 3, 64, 64), tmp_path / "n.onnx"
    model = optimize(net)
    assert_standard(exported(model, x, True, str(path)), convolutions=49)
    assert_equal_under_onnx_runtime(str(path), model, x)
