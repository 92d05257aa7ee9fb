"""Completions of prompts, by our decoder or by a server."""
