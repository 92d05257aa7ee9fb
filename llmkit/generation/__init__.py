"""Completions of prompts, by a local model or by a server."""
