"""Progress bars for iterations that may take long."""

from __future__ import annotations

from tqdm import tqdm


def progress_bar(total: int | None, description: str, progress: bool | None) -> tqdm:
    """A bar on standard error, to be used as a context manager.

    Args:
        total: Number of steps at most, if known.
        description: What is running.
        progress: True shows the bar, False never; None shows it on a terminal once a second has passed.
    """
    disable = None if progress is None else not progress  # tqdm takes None as "off unless it is a terminal"
    return tqdm(total=total, desc=description, disable=disable, delay=1.0 if progress is None else 0.0, leave=False)
