"""The operators as PyTorch sees them (``torch.ops.mixfeat``): schema, fake, autograd, launch on each backend."""

from mixfeat.ops.cross_entropy import mixup_cross_entropy as mixup_cross_entropy
from mixfeat.ops.cross_entropy import soft_target_cross_entropy as soft_target_cross_entropy
from mixfeat.ops.gradient_descent import gradient_descent as gradient_descent
from mixfeat.ops.mixup import mixup as mixup
from mixfeat.ops.pairwise_mixup_loss import check_nodes as check_nodes
from mixfeat.ops.pairwise_mixup_loss import pairwise_mixup_block as pairwise_mixup_block
from mixfeat.ops.pairwise_mixup_loss import pairwise_mixup_loss as pairwise_mixup_loss
from mixfeat.ops.patch_conv import patch_conv as patch_conv
from mixfeat.ops.sharding import group_name as group_name
from mixfeat.ops.sharding import refuse as refuse
