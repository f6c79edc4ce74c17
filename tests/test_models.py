"""The networks: the paper's cost, the original code's names and test, widths, and what is refused."""

import pytest
import torch
from support import Recorder, randomize
from torch.utils.flop_counter import FlopCounterMode

import shufflenet_ext as se
from shufflenet_ext.models import ShuffleNetG2, ShuffleNetG3, shufflenet_v1

STAGE2_CHANNELS = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}


@pytest.mark.parametrize(("groups", "millions"), [(1, 143), (2, 140), (3, 137), (4, 133), (8, 137)])
def test_multiply_adds_of_table_1(groups, millions):
    net = shufflenet_v1(groups).eval()
    counter = FlopCounterMode(display=False)
    # Convolutions alone, as in the paper: the counter knows no native op, and the linear layer is no convolution.
    with se.use_backend("reference"), counter, torch.no_grad():
        net(torch.randn(1, 3, 224, 224))
    flops = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    assert round(flops / 2 / 1e6) == millions


@pytest.mark.parametrize("groups", STAGE2_CHANNELS)
def test_structure_of_table_1(groups):
    net = shufflenet_v1(groups)
    assert [len(layer) for layer in (net.layer1, net.layer2, net.layer3)] == [4, 8, 4]
    channels = 24
    for i, layer in enumerate((net.layer1, net.layer2, net.layer3)):
        stage = STAGE2_CHANNELS[groups] * 2**i
        assert [unit.stride for unit in layer] == [2] + [1] * (len(layer) - 1)
        assert [unit.conv1.out_channels for unit in layer] == [stage // 4] * len(layer)
        assert layer[0].conv3.out_channels == stage - channels
        assert [unit.conv3.out_channels for unit in layer[1:]] == [stage] * (len(layer) - 1)
        assert [unit.conv1.groups for unit in layer] == [1 if i == 0 else groups, *[groups] * (len(layer) - 1)]
        channels = stage
    assert net.linear.in_features == channels


@pytest.mark.parametrize("create", [ShuffleNetG2, ShuffleNetG3])
def test_the_original_codes_test_runs(create, capsys):
    ShuffleNetG2 = create  # noqa: N806

    def test():
        net = ShuffleNetG2()
        x = torch.randn(1, 3, 32, 32)
        y = net(x)
        print(y)
        return y

    assert test().shape == (1, 10)
    assert capsys.readouterr().out.startswith("tensor([[")


@pytest.mark.parametrize(
    ("create", "stages", "mid_channels"),
    [(ShuffleNetG2, (200, 400, 800), (44, 50, 50, 100)), (ShuffleNetG3, (240, 480, 960), (54, 60, 60, 120))],
)
def test_the_original_codes_sizes(create, stages, mid_channels):
    net = create()
    assert net.conv1.weight.shape == (24, 3, 1, 1)
    assert net.linear.weight.shape == (10, stages[2])
    for layer, stage in zip((net.layer1, net.layer2, net.layer3), stages, strict=True):
        assert {unit.conv3.out_channels for unit in layer[1:]} == {stage}
    firsts = (net.layer1[0], net.layer1[1], net.layer2[0], net.layer2[1])
    assert tuple(unit.conv1.out_channels for unit in firsts) == mid_channels


@pytest.mark.parametrize("net", [ShuffleNetG2(), ShuffleNetG3(), shufflenet_v1()], ids=["G2", "G3", "v1"])
def test_key_names(net):
    state = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", *(f"bn1.{k}" for k in state), "linear.weight", "linear.bias"}
    for layer, repeats in (("layer1", 4), ("layer2", 8), ("layer3", 4)):
        for i in range(repeats):
            expected |= {f"{layer}.{i}.conv{j}.weight" for j in (1, 2, 3)}
            expected |= {f"{layer}.{i}.bn{j}.{k}" for j in (1, 2, 3) for k in state}
    assert set(net.state_dict()) == expected


@pytest.mark.parametrize("groups", STAGE2_CHANNELS)
@pytest.mark.parametrize("width", [0.25, 0.5, 1, 1.5, 2.0])
def test_widths(groups, width):
    with torch.device("meta"):
        net = shufflenet_v1(groups, width, num_classes=7)
    stages = [layer[-1].conv3.out_channels for layer in (net.layer1, net.layer2, net.layer3)]
    assert net.conv1.out_channels == 24
    assert stages == [stages[0], 2 * stages[0], 4 * stages[0]]
    assert abs(stages[0] - STAGE2_CHANNELS[groups] * width) <= 2 * groups  # half of what mid must divide by
    assert net(torch.randn(2, 3, 64, 64, device="meta")).shape == (2, 7)
    if width == 1:
        assert stages[0] == STAGE2_CHANNELS[groups]


@pytest.mark.parametrize(("net", "size"), [(ShuffleNetG2(), 32), (ShuffleNetG3(), 32), (shufflenet_v1(), 65)])
def test_network_runs_natively_and_equals_the_reference(net, size):
    net = randomize(net).eval()
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        for images in (x, x.contiguous(memory_format=torch.channels_last)):
            with Recorder() as recorder:
                got = net(images)
            assert recorder.names == ["shufflenet_ext::shuffle_network_batch_norm"]
            with se.use_backend("reference"):
                expected = net(images)
            assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"groups": 5}, ValueError, r"groups: got 5, expected one of \[1, 2, 3, 4, 8\]"),
        ({"groups": "3"}, TypeError, r"groups: got str, expected an int"),
        ({"width": 0}, ValueError, r"width: got 0, expected a positive number"),
        ({"width": -1.0}, ValueError, r"width: got -1\.0, expected a positive number"),
        ({"width": float("nan")}, ValueError, r"width: got nan, expected a positive number"),
        ({"width": float("inf")}, ValueError, r"width: got inf, expected a positive number"),
        ({"width": "1"}, TypeError, r"width: got str, expected a float"),
        ({"num_classes": 0}, ValueError, r"num_classes: got 0, expected a positive int"),
        ({"num_classes": 10.0}, TypeError, r"num_classes: got float, expected an int"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        shufflenet_v1(**arguments)
