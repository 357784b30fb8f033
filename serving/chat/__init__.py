"""`quire chat`: a conversation in the terminal."""
