"""One replica's HTTP API: OpenAI's routes, probes, figures and administration, in front of an engine's process."""
