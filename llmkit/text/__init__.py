"""Parts of text: words, passages and languages; and whether two answers agree."""
