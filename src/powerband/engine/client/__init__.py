"""What another process needs of an engine: start it, send it requests, read their outputs. Loads no torch."""
