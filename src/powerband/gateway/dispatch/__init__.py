"""The dispatcher of each served model on an event loop, and the probes of its replicas."""
