"""Text in and out: tokenizers, incremental decoding, stop strings, chat templates. Never imports
JAX.
"""
