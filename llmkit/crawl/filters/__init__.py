"""Filters that keep or drop a text: URLs, Gopher, C4, FineWeb, classifiers, contamination, personal data."""
