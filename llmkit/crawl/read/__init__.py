"""Reading pages from archives, files and pipes."""
