"""A page becomes its main text."""
