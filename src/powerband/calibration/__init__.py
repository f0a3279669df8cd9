"""Measures this machine and single models, and fits the coefficients of performance models to the measurements."""
