"""Run folders as figures and as one page."""
