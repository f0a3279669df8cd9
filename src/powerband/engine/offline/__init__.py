"""`powerband.LLM`: an engine in the caller's own process, driven by the caller's thread."""
