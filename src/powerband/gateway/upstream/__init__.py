"""Requests to replicas over HTTP and their responses: connections, timeouts, buffering, and how attempts fail."""
