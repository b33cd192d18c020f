"""From passes through a model to estimates: capture, collection, data sets, checkpoints, coverage."""
