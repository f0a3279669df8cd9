"""Which replica a request goes to, and when: queue, fair share, admission, routing, outlier ejection. Pure logic."""
