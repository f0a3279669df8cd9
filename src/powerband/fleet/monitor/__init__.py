"""Whether a service meets its SLO and whether predictions still hold: windows, residuals, checks, incidents."""
