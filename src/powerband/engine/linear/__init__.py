"""Matrix products with a weight: in torch, oneDNN and our own kernels, in 16, 8 and 4 bits. Knows no layers."""
