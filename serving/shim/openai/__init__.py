"""OpenAI's dialect, with the extensions that vLLM's clients send."""
