"""Packaging of ``precond``: one distribution, three import packages. Tool settings live in ``pyproject.toml``."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
PACKAGES = ("precond", "curvature", "solvers")


def version() -> str:
    """What ``precond.__version__`` says, without importing it."""
    source = (HERE / "solvers" / "__init__.py").read_text(encoding="utf-8")
    return next(re.finditer(r'^__version__ = "(.*?)"', source, re.MULTILINE))[1]


def description() -> str:
    """The README for the page of an index, where links into the repository lead nowhere: their text alone."""
    page = (HERE / "README.md").read_text(encoding="utf-8")
    page = re.sub(r"^(?:!\[[^]]*\]\((?!https?:)[^)]*\) ?)+\n+", "", page, flags=re.MULTILINE)
    return re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", page)


PLOT = ["matplotlib>=3.8"]
DEMO = [*PLOT, "scikit-learn>=1.4"]
LAPLACE = ["laplace-torch>=0.3", "safetensors>=0.4"]
DEV = [
    *DEMO,
    *LAPLACE,
    "expecttest>=0.2",  # torch's own checks of optimizers import it
    "gymnasium>=1.0",
    "hypothesis>=6.100",
    "lightning>=2.4",
    "mypy>=1.11",
    "peft>=0.12",
    "playwright>=1.49",  # drives the machine's Chromium, to look at pages
    "pre-commit>=3.7",
    "pytest>=8.2",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.6",
    "skorch>=1.1",
    "tensorboard>=2.17",
    "transformers>=4.44",
    "trl>=0.20",
]

setup(
    name="precond",
    version=version(),
    description="Second-order optimisation for PyTorch: curvature estimators, solvers, and torch.optim optimizers",
    long_description=description(),
    long_description_content_type="text/markdown",
    author="the precond authors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # A single root makes an editable install one path entry, so new modules are seen without reinstalling.
    package_dir={"": "."},
    packages=find_packages(include=[pattern for name in PACKAGES for pattern in (name, f"{name}.*")]),
    package_data={name: ["py.typed"] for name in PACKAGES},
    zip_safe=False,
    install_requires=["torch>=2.9", "numpy>=1.26", "scipy>=1.12", "tqdm>=4.66"],
    extras_require={"plot": PLOT, "laplace": LAPLACE, "demo": DEMO, "dev": DEV},
    keywords=["pytorch", "optimization", "second-order", "curvature", "k-fac", "shampoo", "laplace approximation"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Mathematics",
        "Typing :: Typed",
    ],
)
