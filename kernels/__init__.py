"""Triton kernels and their launchers, installed as ``mixft.kernels``. Imports torch and triton, nothing of mixft."""
