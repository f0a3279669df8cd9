"""The engines that a replica may run, and what they differ in: a file for each.

Command lines, paths, names of metrics, fields of requests, and how a broken stream continues at another replica.

`registry.ADAPTERS` has them by name. No other package compares names of engines: it reads the adapter's fields.
"""
