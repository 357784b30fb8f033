"""Everything that faces a user's process: the command line, later the servers."""
