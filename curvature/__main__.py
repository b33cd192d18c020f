"""``python -m curvature``."""

from __future__ import annotations

import sys

from curvature.cli import main

if __name__ == "__main__":
    sys.exit(main())
