"""Kernels of mixfeat: one folder per backend, each holding one file per operator."""
