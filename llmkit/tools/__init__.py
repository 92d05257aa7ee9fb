"""Tools that a model may use while it writes: a calculator, a search index, a Python sandbox."""
