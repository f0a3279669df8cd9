"""Which replica a request goes to, and when: the queue, the replicas as they are, routing, breakers, probes."""
