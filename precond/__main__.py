"""``python -m precond demo``."""

from __future__ import annotations

from precond.demo import main

if __name__ == "__main__":
    main()
