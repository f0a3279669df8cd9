"""A request's way to a replica and its response's way back, also when replicas fail in the middle."""
