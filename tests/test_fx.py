"""torch.fx.symbolic_trace: a unit is one node, and what is traced computes what it was traced from."""

import copy
import pickle

import pytest
import torch
from support import assert_ran, randomize
from test_fuse import ForeignUnit
from torch import nn
from torch.fx import Tracer, symbolic_trace

import shufflenet_ext as se

OP = "shuffle_bottleneck_batch_norm"


def targets(traced):
    """What the nodes of a graph call: modules, functions and methods."""
    calls = [node.target for node in traced.graph.nodes if node.op.startswith("call")]
    return [call if isinstance(call, str) else call.__name__ for call in calls]


def assert_same(traced, model, *shape):
    x = torch.randn(shape)
    with torch.no_grad():
        got = traced(x)
        torch.testing.assert_close(got, model(x))
    return got


@pytest.fixture
def units():
    """Units of each kind, the last one foreign and fused."""
    model = nn.Sequential(
        se.ShuffleBottleneck(24, 24, 1, 3),
        se.FusedShuffleBottleneck(24, 48, 2, 3),
        nn.Sequential(se.fuse(ForeignUnit(72, 72, 1, 3)), nn.ReLU()),
    )
    return randomize(model).eval()


@pytest.mark.parametrize("training", [False, True])
def test_a_unit_is_one_node(units, training):
    traced = symbolic_trace(units.train(training))
    assert targets(traced) == ["0", "1", "2.0", "2.1"]
    assert_same(traced, units, 2, 24, 7, 9)


def test_a_node_runs_as_the_unit_does(units):
    traced = symbolic_trace(units[1:].train())  # in training mode: what then is done in eval mode is not yet decided
    traced.eval()
    with assert_ran(OP, times=2):
        traced(torch.randn(2, 24, 7, 9))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(traced)))
    assert_same(twin, traced, 2, 24, 7, 9)


def test_a_call_by_name():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.foreign = se.FusedShuffleBottleneck(24, 24, 1, 3), se.fuse(ForeignUnit())

        def forward(self, x):
            return self.foreign(x=self.own(x=x))

    model = randomize(Model())
    traced = symbolic_trace(model)
    assert targets(traced) == ["own", "foreign"]
    assert_same(traced.eval(), symbolic_trace(model).eval(), 1, 24, 5, 5)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_unit_itself_is_traced_inside(stride):
    unit = randomize(se.FusedShuffleBottleneck(24, 24, stride, 3)).eval()
    traced = symbolic_trace(unit)
    inside = ["conv1", "bn1", "relu", "shuffle_channels", "conv2", "bn2", "conv3", "bn3"]
    assert targets(traced)[: len(inside)] == inside
    assert_same(traced, unit, 2, 24, 7, 9)


@pytest.mark.parametrize("hook", ["forward", "forward_pre"])
def test_hooks_run_once(units, hook):
    calls = []

    def called(module, *args):
        calls.append(module)
        return args[-1] * 2 if hook == "forward" else None

    getattr(units[1], f"register_{hook}_hook")(called)
    traced = symbolic_trace(units)
    assert targets(traced)[:2] == ["0", "1.conv1"]
    assert_same(traced, units, 2, 24, 7, 9)
    assert len(calls) == 2  # one of them in the trace


def test_the_ops():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(24, 12, 1, groups=3), nn.Conv2d(12, 12, 3, groups=12)
            self.conv3 = nn.Conv2d(12, 24, 1, groups=3)

        def forward(self, x):
            two = [p for conv in (self.conv1, self.conv2) for p in (conv.weight, conv.bias)]
            y = se.ops.shuffle_bottleneck(x, *two, self.conv3.weight, None, conv1_groups=3, groups=3)
            y = se.ops.pointwise_shuffle_depthwise(y, *two, conv1_groups=3, shuffle_groups=3)
            return se.shuffle_channels(y, groups=4)

    model = Model()
    traced = symbolic_trace(model)
    assert targets(traced) == ["shuffle_bottleneck", "pointwise_shuffle_depthwise", "shuffle_channels"]
    assert_same(traced, model, 2, 24, 7, 9)


class PathTracer(Tracer):
    """Does what the tracer of torchvision's create_feature_extractor does: it keeps for each node the path to it."""

    def __init__(self):
        super().__init__()
        self.current, self.paths = "", {}

    def call_module(self, module, forward, args, kwargs):
        before, self.current = self.current, self.path_of_module(module)
        try:
            if self.is_leaf_module(module, self.current):
                return self.create_proxy("call_module", self.current, args, kwargs)
            return forward(*args, **kwargs)
        finally:
            self.current = before

    def create_node(self, *args, **kwargs):
        node = super().create_node(*args, **kwargs)
        self.paths[node] = self.current
        return node


@pytest.mark.parametrize("training", [False, True])
def test_features_of_a_network(training):
    model = randomize(se.models.shufflenet_v1(width=0.25)).train(training)
    tracer = PathTracer()
    graph = tracer.trace(model)
    repeats = zip((1, 2, 3), se.models.REPEATS, strict=True)
    paths = [f"layer{stage}.{i}" for stage, repeat in repeats for i in range(repeat)]
    assert [path for path in tracer.paths.values() if path.startswith("layer")] == paths
    # A graph that ends in a unit gives the unit's result.
    (node,) = (node for node, path in tracer.paths.items() if path == "layer2.0")
    (output,) = graph.find_nodes(op="output")
    output.args = (node,)
    features = torch.fx.GraphModule(model, graph)
    features.graph.eliminate_dead_code()
    features.recompile()
    features.eval()
    x, seen = torch.randn(1, 3, 64, 64), []
    model.eval().layer2[0].register_forward_hook(lambda module, args, y: seen.append(y))
    with torch.no_grad():
        model(x)
        torch.testing.assert_close(features(x), seen[0])


def classifier():
    units = nn.Sequential(ForeignUnit(24, 24, 1, 3), ForeignUnit(24, 48, 2, 3))
    end = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(72, 5))
    return randomize(nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU(), units, end)).eval()


def test_optimized_models():
    model = classifier()
    optimized = se.optimize_for_inference(model)
    assert targets(symbolic_trace(optimized)) == ["model.0", "model.1", "model.2", "model.3", *targets_of_end()]
    assert_same(symbolic_trace(optimized), optimized, 2, 3, 17, 15)
    network = se.optimize_for_inference(se.models.shufflenet_v1(width=0.25))
    assert targets(symbolic_trace(network)) == ["model"]
    assert_same(symbolic_trace(network), network, 2, 3, 33, 32)


def targets_of_end():
    return ["model.4.0", "model.4.1", "model.4.2"]


def test_captured_models():
    optimized = se.optimize_for_inference(classifier(), example_inputs=(torch.randn(2, 3, 17, 15),))
    traced = symbolic_trace(optimized)
    assert targets(traced) == ["_check_sizes", "model.chain0"]
    assert_same(traced, optimized, 3, 3, 19, 16)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    with pytest.raises(ValueError, match=r"input 0: got shape \[2, 4, 17, 15\], expected \[any, 3, any, any\]"):
        traced(torch.randn(2, 4, 17, 15))
