"""The interfaces between processes; nothing but messages and stubs."""
