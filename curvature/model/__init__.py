"""The user's module, data and parameters, and how the module is run again."""
