"""How the embedded model is made: corpus, tokenizer, trainer, evaluation. Not part of the wheel."""
