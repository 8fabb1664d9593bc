"""The operators as PyTorch sees them (``torch.ops.mixfeat``): a module each, which the operator's name tells.

A module declares its operator (:mod:`mixfeat.ops.registration`), and chooses the kernel of the backend that serves.
"""
