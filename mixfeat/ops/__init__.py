"""The operators as PyTorch sees them (``torch.ops.mixfeat``): one module for each, named after it.

A module declares its operator (:mod:`mixfeat.ops.registration`) and chooses the kernel of the serving backend.
"""
