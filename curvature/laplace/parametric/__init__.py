"""Posteriors of laplace-torch's interface in our structures, and their files."""
