"""The benchmarks, installed as ``mixft.benchmarks``: one registry that pytest-benchmark and ``mixft bench`` read."""
