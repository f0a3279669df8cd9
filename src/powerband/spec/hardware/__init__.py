"""What devices are: detection, the catalog, measured profiles and what is assumed where nothing was measured."""
