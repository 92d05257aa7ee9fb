"""Models behind HTTP: OpenAI's protocol, one page, and people's judgements."""
