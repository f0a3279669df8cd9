"""From a checkpoint's name to a decoder that holds its weights."""
