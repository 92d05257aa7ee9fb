"""Records: conversations, preferences, problems, questions."""
