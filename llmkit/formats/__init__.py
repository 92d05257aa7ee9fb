"""What a record is: conversations, preferences, problems, questions."""
