"""Commands for one model: serve, generate, eval, memory."""
