"""Requests whose prompts are pooled: embeddings, scores of pairs, and rankings."""
