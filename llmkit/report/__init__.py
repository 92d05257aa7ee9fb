"""Reports on runs, as JSON and as one HTML page."""
