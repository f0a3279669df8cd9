"""Adapters for the engines that a replica may run, one file per engine.

An adapter has the engine's command line, paths, metric names and request fields, and resumes a broken stream.

`registry.ADAPTERS` has them by name. Other packages never compare engine names: they read the adapter's fields.
"""
