"""What the gateway shows of itself: metrics, access log, traces, recent requests."""
