"""Archives, files and pipes become pages."""
