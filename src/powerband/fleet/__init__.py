"""Carry out a plan on a target, keep it running, and watch over its promise."""
