"""From web archives to documents: reading, extraction, language, filters, dedup, personal data."""
