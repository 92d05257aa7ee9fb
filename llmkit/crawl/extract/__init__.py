"""Main-text extraction from HTML pages."""
