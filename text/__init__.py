"""How text becomes rows: tokenizers, windows, packed lines, prompts and answers, and the files of people."""
