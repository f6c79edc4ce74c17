"""The benchmark suite: ``python -m benchmarks`` from the repository's root; see ``--help``."""
