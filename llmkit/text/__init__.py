"""What text is made of: words, passages, languages, and whether two answers agree."""
