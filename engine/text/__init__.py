"""Text: tokenizers, incremental detokenising, the vocabularies that the package ships as data."""
