"""Tools for models: a calculator, search, a Python sandbox, and the user's functions."""
