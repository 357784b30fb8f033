"""Starts the processes of an engine, watches them and ends them."""
