"""Benchmarks: each prints one JSON object a line. Numbers that documents quote lie in results/."""
