"""Runs side by side on a page of their own."""
