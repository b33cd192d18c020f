"""The preconditioner of a block of parameters: its refreshes, its state, its rows."""
