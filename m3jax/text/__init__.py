"""Text: documents, tokenizer, token corpus, references, and the overlap between texts."""
