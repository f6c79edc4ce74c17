"""Whole networks: the paper's at 224², and the original code's at 32²."""

from benchmarks import peers
from benchmarks.conftest import Compete
from benchmarks.shapes import NetworkShape


def bench_network(network: NetworkShape, compete: Compete) -> None:
    module, x = network.build()
    compete("networks", network, peers.ours(module, x), peers.plain_copy(module), peers.folded_copy(module), x)
