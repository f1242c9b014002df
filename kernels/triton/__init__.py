"""Triton kernels, one file for each family of operators: kernels, then the launcher. Imported by dispatch alone."""
