"""Runs one dispatcher per served model on the event loop, and probes the replicas."""
