"""What pages, pictures and tables of results share: style, elements, words and intervals."""
