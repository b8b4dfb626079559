"""The gradient of an operator, and a clear error for every derivative that it has not.

PyTorch takes a custom operator for a constant in forward mode, and so answers `torch.func.jvp` with
zeros; a second derivative and `torch.func.grad` it refuses in words about its own insides. Here
each of them is an error that says what serves instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch.autograd import forward_ad
from torch.library import CustomOpDef

# A kernel for one of these goes before the one that custom_op itself has registered for them all.
_DISPATCH_KEYS = ("AutogradCPU", "AutogradCUDA", "AutogradMPS", "AutogradXPU")
_LIBRARY = torch.library.Library("fastgoal", "IMPL")


def register_first_derivative(
    op: CustomOpDef, derivative: CustomOpDef, backward: Callable, setup_context: Callable
) -> None:
    """Make `op` differentiable once, in reverse mode.

    Args:
        op: the operator.
        derivative: the operator that `backward` calls; it gets no derivative of its own.
        backward, setup_context: as of `torch.library.register_autograd`.
    """

    def refuse_second_derivative(ctx, *grads):
        raise refusal(op, "no second derivative (create_graph=True)")

    op.register_autograd(backward, setup_context=setup_context)
    derivative.register_autograd(refuse_second_derivative)
    _refuse_transforms(op)
    _refuse_transforms(derivative)


def refusal(op: CustomOpDef, what: str) -> RuntimeError:
    """The error to raise where `op` has no such derivative."""
    return RuntimeError(
        f"{op._opoverload.name()} has {what}, only first derivatives by backward() or "
        "torch.autograd.grad. Fix: backend='reference', or the block use_backend('reference'), "
        "which is plain PyTorch and has them all, but holds every intermediate tensor"
    )


def _refuse_transforms(op: CustomOpDef) -> None:
    """At autograd's place in the dispatcher: above it, a transform's tensors hide what they are."""
    differentiate = make_autograd_impl(op._opoverload, op)

    def autograd(keyset, *args, **kwargs):
        tensors = [x for x in args if isinstance(x, Tensor)]
        # Not so inside a vmap alone, which calls the operator for one element after the other.
        transformed = torch._C._are_functorch_transforms_active() and torch.is_grad_enabled()
        if transformed and any(x.requires_grad for x in tensors):
            raise refusal(op, "no derivative by torch.func (grad, vjp, jacrev, hessian)")
        if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            raise refusal(op, "no forward mode (torch.func.jvp, jacfwd, autograd.forward_ad)")
        return differentiate(keyset, *args, **kwargs)

    for key in _DISPATCH_KEYS:
        _LIBRARY.impl(op._opoverload, autograd, key, with_keyset=True)


def wants_gradient(x: Tensor) -> bool:
    """Whether a backward may come for it."""
    if not torch.is_grad_enabled() or x.requires_grad:
        return torch.is_grad_enabled()
    # Inside torch.vmap a tensor does not know what is wanted of it outside. Not every torch.compile
    # can trace the question.
    return not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(x)
