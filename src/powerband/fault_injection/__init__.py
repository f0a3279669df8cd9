"""Misbehaving clients for chaos tests: cancelled, slow, malformed and oversized requests."""
