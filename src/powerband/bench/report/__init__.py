"""What became of a load: figures of a run, its files, tables and pages, and comparisons of runs."""
