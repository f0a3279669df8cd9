"""`powerband gateway`, and commands that ask a running gateway: keys, usage, audit."""
