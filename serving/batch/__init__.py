"""Many requests from a JSONL file, answers to another: `quire generate --input … --output …`."""
