"""One set of numbers: the record of a request, its latency figures, Prometheus metrics, and logging."""
