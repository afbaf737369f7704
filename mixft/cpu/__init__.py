"""CPU routines built on torch's own fast paths; each has the name and signature of a launcher in ``mixft.kernels``."""
