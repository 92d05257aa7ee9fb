"""Rules that keep or drop a text: addresses, Gopher, C4, FineWeb, personal data."""
