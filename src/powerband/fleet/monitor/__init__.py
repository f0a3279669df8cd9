"""Whether the promise is kept and predictions still hold: windows, residuals, signs, incidents."""
