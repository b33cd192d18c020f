"""Parameter groups by what parameters do in a model."""
