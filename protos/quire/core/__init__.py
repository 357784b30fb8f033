"""Between gateway and core."""
