"""What sends a load: worker processes, their connections, prompts and responses."""
