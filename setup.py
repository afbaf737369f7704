"""The folder kernels/ installs as mixft.kernels; everything else about the package is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mixft", "mixft.*"]), "mixft.kernels"],
    package_dir={"mixft": "mixft", "mixft.kernels": "kernels"},
    package_data={"mixft.kernels": ["configs/*.json"]},
)
