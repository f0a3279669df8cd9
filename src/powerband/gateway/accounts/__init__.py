"""Who may come in, what they may use, and what they used: keys, limits, usage, audit, feedback, kept content."""
