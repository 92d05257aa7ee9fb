"""What a web page is: reading archives, main text, language, filters, duplicates, personal data."""
