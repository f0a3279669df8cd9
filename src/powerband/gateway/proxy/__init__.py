"""Forwards requests to replicas and relays their responses, also when replicas fail in the middle."""
