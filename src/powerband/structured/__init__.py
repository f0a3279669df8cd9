"""Structured output: from what a request asks of its answer's form to masks over the vocabulary, by llguidance."""
