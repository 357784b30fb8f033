"""The core process: the step loop behind a private socket."""
