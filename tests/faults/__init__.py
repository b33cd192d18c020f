"""Faults of every kind, at every moment, in every method: what becomes of a run that meets one."""
