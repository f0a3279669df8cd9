"""One engine: executors, the model runner, layers, attention, kernels. Importing this package loads no torch."""
