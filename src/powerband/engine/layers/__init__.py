"""The parts that decoders are made of, each with a reference in plain torch."""
