"""One file per architecture; the registry maps a config's model_type to it."""
