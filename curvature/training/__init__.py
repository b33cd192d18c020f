"""What happens to curvature while a model trains."""
