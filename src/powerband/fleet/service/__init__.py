"""A service: what it should be, what it is, and the files that hold both."""
