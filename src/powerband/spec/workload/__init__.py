"""What users send: arrivals, lengths, conversations, presets and recorded traces."""
