"""What a training step and a curvature cost beside the same of other libraries: ``python -m tests.benchmarks.harness``.

The files here import each other by their bare names, so that ``ours.py`` and ``ours_curvature.py`` serve this harness
and any other that has a ``registry``, ``workloads`` and peers of its own.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
