"""Executors carry out steps: in this process, and later in several."""
