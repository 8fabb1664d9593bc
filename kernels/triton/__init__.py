"""Triton kernels: one file per operator, the activations they share, and how they are launched."""
