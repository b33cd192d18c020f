"""How a computation ended: errors, checks, progress, and what a solve reports."""
