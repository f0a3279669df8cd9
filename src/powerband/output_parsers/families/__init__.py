"""One file for each format: its parser, and its grammar for calls that keep to their schemas."""
