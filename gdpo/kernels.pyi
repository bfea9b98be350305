# For type checkers, which do not follow kernels.py: the folder kernels/ under the names that kernels.py resolves.
from kernels.complexity import attribute_ratios as attribute_ratios
from kernels.complexity import complexity_map as complexity_map
from kernels.dispatch import use_triton as use_triton
from kernels.gate import geglu as geglu
from kernels.loss import gdpo_loss as gdpo_loss
from kernels.norm import group_norm as group_norm
from kernels.residual import residual_sum as residual_sum
from kernels.reward import attribute_reward as attribute_reward
from kernels.reward import group_scores as group_scores
from kernels.statistics import AttributeStatistics as AttributeStatistics
from kernels.statistics import attribute_statistics as attribute_statistics
