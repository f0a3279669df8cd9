"""Kernels for devices: Triton for GPUs. Each has a reference in plain torch that it is tested against."""
