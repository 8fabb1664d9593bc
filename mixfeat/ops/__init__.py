"""The operators as PyTorch sees them (``torch.ops.mixfeat``): schema, fake, autograd, launch on each backend."""

from mixfeat.ops.patch_conv import patch_conv as patch_conv
