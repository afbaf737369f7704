"""The cases by family, one module each; ``mixft.benchmarks.registry`` gathers their ``CASES``."""
