"""An HTTP server for models: OpenAI's API, a web page, and human feedback."""
