"""From web archives to documents: reading, main text, language, filters, duplicates, personal data."""
