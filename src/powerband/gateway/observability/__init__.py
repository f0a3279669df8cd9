"""The gateway's observability: metrics, access log, traces, recent requests."""
