"""What run folders tell of themselves, as figures and as one page."""
