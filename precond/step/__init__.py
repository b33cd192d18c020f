"""The order of a step, schedules, options, and the move of parameters."""
