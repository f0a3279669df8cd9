"""One decoder for all families, and for each family a short file on what its checkpoints call things."""
