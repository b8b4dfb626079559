"""The Triton engine of MaxSim: its forward and its backward, for CUDA tensors."""

from .maxsim_backward_triton import backward as backward
from .maxsim_forward_triton import forward as forward
