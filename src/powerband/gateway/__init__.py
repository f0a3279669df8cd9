"""The gateway before the replicas: API keys, limits, routing, failover, usage. Talks to replicas over HTTP only."""
