"""`powerband bench` and its options."""
