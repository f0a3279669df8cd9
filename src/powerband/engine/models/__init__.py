"""One decoder for all families, and for each family a short file with the names of its tensors."""
