"""``python -m precond``."""

from __future__ import annotations

from precond.command_line import main

if __name__ == "__main__":
    main()
