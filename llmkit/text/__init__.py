"""Words and languages of texts, and judging answers by their words."""
