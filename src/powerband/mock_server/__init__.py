"""An OpenAI-compatible server without a model: its timing and its failures are given. For tests and measurements."""
