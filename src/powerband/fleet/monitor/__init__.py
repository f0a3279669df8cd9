"""Monitors whether a service meets its SLO and its predictions still hold: windows, residuals, checks, incidents."""
