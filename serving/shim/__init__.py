"""The HTTP front: dialects of other servers as requests of quire.v1. No JAX, no tokenizer."""
