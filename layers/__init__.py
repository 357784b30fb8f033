"""Pure functions over arrays and the weights they read. A layer never sees a request."""
