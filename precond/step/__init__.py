"""The order of a step, schedules, options, and what moves parameters."""
