"""Batches larger than memory: the gradient is cached at the features (GradCache, arXiv 2101.06983).

A contrastive loss needs the features of the whole batch at once, but nothing of the encoder that
made them. So the batch goes through the encoder in chunks that keep no graph; the loss is taken
over all features, and its gradient with respect to them is kept; then each chunk goes through the
encoder once more, with a graph, and its slice of that gradient goes back through it. The gradients
are those of one big batch, and the activations alive at a time are those of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import (
    TreeSpec,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_unflatten,
)

from .checks import shape_of, values_are_checked

Encode = Callable[[Any], Any]


def cached_backward(
    encode: Encode | Sequence[Encode],
    inputs: Any,
    loss: Callable[..., Tensor | dict[str, Tensor]],
    *,
    chunk_size: int | Sequence[int],
    module: nn.Module | Sequence[nn.Module | None] | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor | dict[str, Tensor]:
    """Loss and backward of a batch whose activations do not fit, by chunks (arXiv 2101.06983).

    It stands in for `loss(encode(inputs))` and its `backward()`: afterwards every parameter's
    `.grad` has grown by the gradient of that one loss, up to the rounding of another order of sums.
    The optimizer's step, clipping and `zero_grad` stay yours.

    >>> loss = cached_backward(
    ...     lambda batch: model(*batch),  # open_clip, output_dict=True
    ...     (images, texts),
    ...     lambda outputs: clip_loss(**outputs),
    ...     chunk_size=256,
    ... )
    >>> optimizer.step()

    The price is a second forward pass of all chunks but the last, whose graph is kept; with one
    chunk there is none. Alive are all that `encode` returns, with its gradient, and the activations
    of one chunk; while the loss runs, its own memory and the activations of the last chunk.

    Towers can be chunked apart, each with its own length and chunk size: give tuples of `encode`,
    `inputs` and `chunk_size`, and the loss gets the outputs as so many arguments. A frozen tower
    that is given apart runs once. (In one `encode` with a tower that learns, it runs again.)

    What `encode` may be: any function whose rows depend on their own items alone.

    - Layers that mix items, batch norm in training mode above all, give another result in chunks
      than in one batch, and their running statistics would be updated twice. Such a batch norm is
      refused where `module` shows it; put it in eval mode, or use group or layer norm.
    - Dropout is fine: each chunk's second pass starts from the random state of its first, of
      PyTorch's CPU and CUDA generators. They end where running the chunks in order, then the loss,
      would leave them. Python's and NumPy's random numbers and generators of your own are not
      replayed.
    - A surrounding `torch.autocast` covers both passes and the loss, and no backward, as PyTorch
      advises. `torch.compile`d encoders and activation checkpointing work.
    - Under DistributedDataParallel gradients travel once, in the backward of the chunk that comes
      last, also those of parameters that the loss uses directly; every process must have equally
      many chunks. Towers chunked apart need a DDP module each. FSDP2 reduces after every chunk,
      which is as right, and keeps no whole gradients.

    Args:
        encode: called with a chunk of `inputs`, in the same structure. It returns a tensor, or
            tuples, lists and dicts of tensors: each either has the chunk's items as its first
            dimension, or is 0-dim and the same in every chunk (a logit scale). Masks and other
            tensors without gradient, and None, may be among them. Trailing dimensions are the same
            in every chunk: pad to one length. K captions an image are (items, K, ...) on both
            sides, flattened by the loss.
        inputs: a tensor, or tuples, lists and dicts of tensors (or None) of equal first dimension,
            the items. They may live on the CPU, and `encode` move its chunk to the device. A leaf
            that requires a gradient gets it.
        loss: called with `encode`'s outputs for all items, in their structure. It returns a 0-dim
            tensor, or a dict of such, whose sum is then the loss. Parameters that it uses itself
            (a pool, a temperature) get their gradients in its one backward.
        chunk_size: items a chunk; the last one may be smaller.
        module: what `encode` runs, where `encode` is not that module itself: so that its DDP
            modules exchange gradients once, and its batch norm is refused. For towers apart a tuple
            of one, or None, for each.
        scaler: the loss is scaled by it before its backward. Unscaling stays yours.

    Returns:
        What `loss` returned, detached and unscaled.

    Raises:
        ValueError: a chunk_size below 1; inputs of unequal length or without a tensor; outputs
            whose first dimension is not the chunk's, or that differ between chunks where they may
            not; batch norm in training mode; one DDP module in several towers.
        TypeError: inputs or outputs that are not tensors, a loss that is not a 0-dim tensor.
        RuntimeError: called under `torch.no_grad` or `inference_mode`; a loss that needs no
            gradient; inputs that are part of a graph.

    Any error before the loss's backward, also one of `encode` or `loss`, leaves every `.grad` as it
    was. After one in the second pass (out of memory, say) `.grad` holds a part: call `zero_grad`.
    """
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise RuntimeError(
            "cached_backward computes gradients, but is called under torch.no_grad or "
            "torch.inference_mode. Fix: call it outside"
        )
    towers = _towers(encode, inputs, chunk_size, module)
    outputs = [tower.encode_all(keep_last=tower is towers[-1]) for tower in towers]
    parts = loss(*outputs)
    total = _sum_of_parts(parts)
    if not total.requires_grad:
        raise RuntimeError(
            "loss depends on nothing that requires a gradient. Fix: leave something unfrozen, and "
            "use no torch.no_grad and no detach in encode or loss"
        )
    result = _detached(parts)
    total = total if scaler is None else scaler.scale(total)
    exchanged = (p for tower in towers for ddp in tower.exchanges for p in ddp.parameters())
    with _used_by_the_loss(exchanged) as used:
        _backward_without_autocast([total])
    for tower in towers:
        tower.take_gradients()
    del outputs, parts, total  # with them go the features: the chunks to come need the room
    states = _random_states()
    try:
        # The tower whose last chunk kept its graph comes first, so that no other graph joins it.
        for tower in reversed(towers):
            tower.backward_all(used)
    finally:
        _set_random_states(states)
    return result


class _Tower:
    """One `encode` with its inputs, their chunks and, between the passes, its features."""

    def __init__(self, names: Sequence[str], encode: Any, inputs: Any, size: Any, module: Any):
        name, inputs_name = names
        if not callable(encode):
            raise TypeError(f"{name} must be callable, not {type(encode).__name__}")
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"chunk_size must be an int; got {size!r}")
        if size < 1:
            raise ValueError(f"chunk_size must be at least 1; got {size}")
        if module is not None and not isinstance(module, nn.Module):
            raise TypeError(f"module must be the nn.Module that {name} runs; got {module!r}")
        self.name, self.encode = name, encode
        self.exchanges: list[DistributedDataParallel] = []
        for known in (encode, module):
            if isinstance(known, nn.Module):
                _refuse_batch_norm(known)
                found = (m for m in known.modules() if isinstance(m, DistributedDataParallel))
                self.exchanges += (ddp for ddp in found if ddp not in self.exchanges)
        length = _length(inputs_name, inputs)
        self.inputs, self.structure = tree_flatten(inputs)
        # At least one chunk, so that an empty batch has outputs, and a loss.
        self.bounds = [(a, min(a + size, length)) for a in range(0, max(length, 1), size)]
        self.states: list[list[Tensor]] = []
        self.features: dict[str, Tensor | None] = {}
        self.output_structure: TreeSpec | None = None
        self.gradients: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor | None] | None = None

    def encode_all(self, keep_last: bool) -> Any:
        """The first pass: the outputs of all items, detached, as leaves that collect gradients.

        No chunk has a graph but the last, which shows what requires a gradient. Its graph is kept
        under `keep_last`, so that this chunk need not run again.
        """
        last = len(self.bounds) - 1
        with torch.no_grad():
            for number in range(last):
                self.states.append(_random_states())
                self._collect(number, *self._encode(number, exchange=False))
        # Older PyTorch (2.6) keeps autocast's copies of the weights also where they were made
        # without a graph, and would use them here: the weights would get no gradient.
        torch.clear_autocast_cache()
        self.states.append(_random_states())
        outputs, structure = self._encode(last, exchange=False)
        self._collect(last, outputs, structure)
        for name, feature in self.features.items():
            output = outputs[name]
            if feature is not None and output is not None:
                feature.requires_grad_(output.requires_grad)
        # DDP decides in a forward whether its backward exchanges, and chunk 0's is to.
        if keep_last and (last > 0 or not self.exchanges):
            self.kept = outputs
        return tree_unflatten(list(self.features.values()), structure)

    def take_gradients(self) -> None:
        """What the loss's backward left at the features stays; the features go."""
        for name, feature in self.features.items():
            if feature is not None and feature.grad is not None:
                self.gradients[name] = feature.grad
        self.features = {}

    def backward_all(self, used_by_the_loss: Sequence[Tensor]) -> None:
        """The second pass: every chunk's slice of the gradient goes back through it.

        From the last chunk, which still has its graph, down to chunk 0, where DDP exchanges and
        where what does not depend on the items gets its gradient.
        """
        own = {id(p) for ddp in self.exchanges for p in ddp.parameters()}
        waiting = [p for p in used_by_the_loss if id(p) in own]
        for number in reversed(range(len(self.bounds))):
            self._backward(number, waiting)

    def _backward(self, number: int, waiting: Sequence[Tensor]) -> None:
        """One chunk's. A function of its own, so that nothing of the chunk outlives it."""
        start, stop = self.bounds[number]
        is_final = number == 0
        shares = {
            name: gradient[start:stop] if gradient.ndim else gradient
            for name, gradient in self.gradients.items()
            if gradient.ndim or is_final
        }
        outputs, self.kept = self.kept, None
        if not shares and not (is_final and waiting):
            return
        if outputs is None:
            _set_random_states(self.states[number])
            outputs, _ = self._encode(number, exchange=is_final)
        roots = [root for name in shares if (root := outputs[name]) is not None]
        pushed = list(shares.values())
        if is_final:
            # What the loss uses directly has its gradient by now, but DDP exchanges it only when it
            # hears of the parameter in this backward: a gradient of zero tells it.
            roots += waiting
            pushed += [torch.zeros_like(parameter) for parameter in waiting]
        _backward_without_autocast(roots, pushed)

    def _encode(self, number: int, exchange: bool) -> tuple[dict[str, Tensor | None], TreeSpec]:
        """A chunk's outputs by name, and their structure."""
        start, stop = self.bounds[number]
        chunk = [None if leaf is None else leaf[start:stop] for leaf in self.inputs]
        with ExitStack() as stack:
            if not exchange:
                for ddp in self.exchanges:
                    stack.enter_context(ddp.no_sync())
            outputs = self.encode(tree_unflatten(chunk, self.structure))
        leaves, structure = tree_flatten_with_path(outputs)
        return {f"{self.name}(...){keystr(path)}": leaf for path, leaf in leaves}, structure

    def _collect(self, number: int, outputs: dict[str, Tensor | None], structure: TreeSpec) -> None:
        """Copy a chunk's outputs to their place among all items'."""
        start, stop = self.bounds[number]
        items = f"items {start} to {stop - 1}"
        for name, output in outputs.items():
            _check_output(name, output, stop - start)
        if number == 0:
            # One copy of all features, and not a list of chunks beside their concatenation.
            total = self.bounds[-1][1]
            self.features = {name: _room(output, total) for name, output in outputs.items()}
            self.output_structure = structure
        if structure != self.output_structure:
            raise ValueError(
                f"{self.name} must return the same structure for every chunk; got "
                f"{self.output_structure} for the first and {structure} for {items}"
            )
        for name, output in outputs.items():
            whole = self.features[name]
            if output is None or whole is None:
                if output is not whole:
                    raise ValueError(f"{name} is None for some chunks and a tensor for others")
                continue
            alike = output.dtype, output.ndim, output.shape[1:]
            if alike != (whole.dtype, whole.ndim, whole.shape[1:]):
                raise ValueError(
                    f"{name} is {output.dtype} {shape_of(output)} for {items}, but after the first "
                    f"chunk that of all items is {whole.dtype} {shape_of(whole)}. Fix: pad every "
                    "chunk to one length"
                )
            if output.ndim:
                whole[start:stop].copy_(output.detach())
            elif values_are_checked(output) and not torch.allclose(
                output, whole, rtol=0, atol=0, equal_nan=True
            ):
                raise ValueError(
                    f"{name} is 0-dim and must be the same in every chunk; got {whole.item()} for "
                    f"the first and {output.item()} for {items}. Fix: return one value an item, "
                    "and reduce them in the loss"
                )


def _towers(encode: Any, inputs: Any, chunk_size: Any, module: Any) -> list[_Tower]:
    """The towers, with the names under which errors speak of their arguments."""
    if not isinstance(encode, (tuple, list)):
        return [_Tower(("encode", "inputs"), encode, inputs, chunk_size, module)]
    count = len(encode)
    if not isinstance(inputs, (tuple, list)) or len(inputs) != count or count == 0:
        got = len(inputs) if isinstance(inputs, (tuple, list)) else type(inputs).__name__
        raise ValueError(
            "inputs must be a tuple with one entry for each function in encode; got "
            f"{count} functions, inputs {got}"
        )
    lists = []
    for name, value in (("chunk_size", chunk_size), ("module", module)):
        if not isinstance(value, (tuple, list)):
            if isinstance(value, nn.Module):
                raise ValueError(
                    f"module must be a tuple with one module or None for each of the {count} "
                    "functions in encode; got one module"
                )
            value = [value] * count
        if len(value) != count:
            raise ValueError(
                f"{name} must have one entry for each of the {count} functions in encode; "
                f"got {len(value)}"
            )
        lists.append(value)
    towers = []
    for number, arguments in enumerate(zip(encode, inputs, *lists, strict=True)):
        towers.append(_Tower((f"encode[{number}]", f"inputs[{number}]"), *arguments))
    exchanges = [ddp for tower in towers for ddp in tower.exchanges]
    if len({id(ddp) for ddp in exchanges}) < len(exchanges):
        raise ValueError(
            "towers chunked apart need a DistributedDataParallel module each, since each exchanges "
            "gradients in a backward of its own; got one in several. Fix: wrap the towers one by "
            "one, or give one encode that runs them all"
        )
    return towers


def _length(name: str, inputs: Any) -> int:
    """The number of items, which all tensors must agree on."""
    found: dict[str, Tensor] = {}
    for path, leaf in tree_flatten_with_path(inputs)[0]:
        here = name + keystr(path)
        if leaf is None:
            continue
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{here} must be a tensor, not {type(leaf).__name__}. Fix: give tensors in tuples, "
                "lists or dicts, and let encode take everything else from where it is defined"
            )
        if leaf.ndim == 0:
            raise ValueError(
                f"{here} is 0-dim, but the first dimension must be the items. "
                "Fix: let encode take it from where it is defined"
            )
        if leaf.grad_fn is not None:
            raise RuntimeError(
                f"{here} is part of a graph, which every chunk's backward would walk again. "
                "Fix: compute it in encode, or detach it"
            )
        found[here] = leaf
    if not found:
        raise ValueError(f"{name} must hold a tensor whose first dimension is the items; got none")
    if len({len(leaf) for leaf in found.values()}) > 1:
        shapes = ", ".join(f"{here} {shape_of(leaf)}" for here, leaf in found.items())
        raise ValueError(
            f"{name} must have the same first dimension, the items, throughout; got {shapes}. Fix: "
            "K captions an image are (images, K, ...), or chunk the towers apart with tuples of "
            "encode and inputs"
        )
    return len(next(iter(found.values())))


def _check_output(name: str, output: object, items: int) -> None:
    if output is None:
        return
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{name} must be a tensor, not {type(output).__name__}. Fix: return tensors in tuples, "
            "lists or dicts, and let the loss take everything else from where it is defined"
        )
    if output.ndim and len(output) != items:
        raise ValueError(
            f"{name} {shape_of(output)} must have the chunk's {items} items as its first "
            "dimension, or be 0-dim. Fix: K rows an item are (items, K, ...), ragged tokens are "
            "padded (the loss can pack them), a scalar is reshape(())"
        )


def _room(output: Tensor | None, items: int) -> Tensor | None:
    """Where the outputs of all items will lie; what does not depend on them is there already."""
    if output is None or output.ndim == 0:
        return None if output is None else output.detach().clone()
    return output.detach().new_empty(items, *output.shape[1:])


def _refuse_batch_norm(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        # Without running statistics it takes the batch's in eval mode too.
        if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None):
            raise ValueError(
                f"module's {name or type(layer).__name__} is batch norm in training mode: its "
                "statistics would be those of a chunk. Fix: its eval mode, or group or layer norm"
            )


def _sum_of_parts(parts: object) -> Tensor:
    """The loss, of a tensor or of a dict of named parts."""
    named = parts if isinstance(parts, dict) else {"": parts}
    if not named:
        raise ValueError(
            "loss returned an empty dict; it must return a 0-dim tensor or a dict of them"
        )
    for name, part in named.items():
        if not isinstance(part, Tensor) or part.ndim:
            got = f"shape {shape_of(part)}" if isinstance(part, Tensor) else type(part).__name__
            where = f"[{name!r}]" if isinstance(parts, dict) else ""
            raise TypeError(
                f"loss must return a 0-dim tensor, or a dict of them; loss(...){where} is {got}"
            )
    first, *others = named.values()
    for part in others:
        first = first + part
    return first


def _detached(parts: Tensor | dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
    if isinstance(parts, dict):
        return {name: part.detach() for name, part in parts.items()}
    return parts.detach()


@contextmanager
def _used_by_the_loss(parameters: Iterable[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Of `parameters`, those that get a gradient in this block."""
    used: list[Tensor] = []
    hooks = [
        parameter.register_hook(lambda _, parameter=parameter: used.append(parameter))
        for parameter in parameters
        if parameter.requires_grad
    ]
    try:
        yield used
    finally:
        for hook in hooks:
            hook.remove()


def _backward_without_autocast(roots: list[Tensor], gradients: list[Tensor] | None = None) -> None:
    """As PyTorch asks of a backward: its operators take the dtypes that the forward chose."""
    with ExitStack() as stack:
        for device_type in {root.device.type for root in roots}:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        torch.autograd.backward(roots, gradients)


def _random_states() -> list[Tensor]:
    """The states of the CPU's generator and of every CUDA device's, wherever `encode` may run."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def _set_random_states(states: list[Tensor]) -> None:
    cpu, *cuda = states
    torch.set_rng_state(cpu)
    for device, state in enumerate(cuda):
        torch.cuda.set_rng_state(state, device)
