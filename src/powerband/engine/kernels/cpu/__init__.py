"""Kernels in C++ for CPUs: `library` builds and loads them, csrc/ holds them, one file for each family of operators."""
