"""`quire bench`: throughput, latency and start-up of a model, in vLLM's names and terms."""
