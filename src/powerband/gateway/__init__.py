"""The front door: keys, limits, routing, failover, usage. Talks to replicas over HTTP only."""
