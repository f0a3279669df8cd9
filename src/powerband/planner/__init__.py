"""Which deployment to choose, from predictions alone: simulator, search, frontier, report. No torch."""
