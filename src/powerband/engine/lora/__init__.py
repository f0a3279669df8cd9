"""LoRA adapters: their files read and checked, and those that are loaded, by name."""
