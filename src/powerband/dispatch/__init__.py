"""Decides which replica a request goes to, and when: fair queue, admission, routing, outlier ejection. Pure logic."""
