"""The loss along lines and planes, and between models."""
