"""A service: its desired state, its observed status, and the files that hold both."""
