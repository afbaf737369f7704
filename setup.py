"""Installs kernels/ as mixft.kernels and benchmarks/ as mixft.benchmarks; all else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["mixft", "mixft.*"]),
        "mixft.kernels",
        "mixft.benchmarks",
        "mixft.benchmarks.cases",
    ],
    package_dir={"mixft": "mixft", "mixft.kernels": "kernels", "mixft.benchmarks": "benchmarks"},
    package_data={"mixft.kernels": ["configs/*.json"]},
)
