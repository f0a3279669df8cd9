"""What a model is: its architecture, read from config.json."""
