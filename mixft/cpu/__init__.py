"""CPU routines by the names and signatures of the launchers in ``mixft.kernels``: compiled C, or torch's fast paths."""
