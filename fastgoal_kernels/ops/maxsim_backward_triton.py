"""The MaxSim backward in Triton. The winners say everything; no similarity is computed again.

A side's tokens get gradients as queries (from the keys that they chose) and as keys (from the
queries that chose them), by one of two ways:

    lists     gather the chosen keys, and sum the choosing queries that an inverted index lists
              (`maxsim_gather_triton`, `maxsim_scatter_triton`)
    product   multiply the other side's rows with the matrix of shares, which is 0 but where a
              query meets its key (`maxsim_product_triton`)

Every gradient is summed in a fixed order by one program and written once: no atomics, the same
bits every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .maxsim_gather_triton import gather_gradient
from .maxsim_product_triton import product_gradient
from .maxsim_scatter_triton import items_at_once, scatter_gradient
from .tiles_triton import float32_precision
from .token_rows import TokenRows

Direction = tuple[Tensor, Tensor]  # winners, dL/dS (own items, other items)

# Rates of an H200. Of bf16 products: measured, by cuBLAS; TF32 has half of it, IEEE float32 runs on
# the ordinary cores (datasheet). L2's is a published lead, not our measurement.
_FLOP_PER_SECOND = {"bf16": 790e12, "tf32": 395e12, "ieee": 60e12}
_L2_BYTES_PER_SECOND = 5.5e12


def expected_seconds(
    own: TokenRows, other: TokenRows, as_queries: bool, as_keys: bool
) -> dict[str, float]:
    """What the gradient of `own` takes at least, by each way, counted and not measured.

    Lists read a row of L2 for every query and every item that it queries. The product multiplies
    all pairs of rows, once for both directions.
    """
    dtype, dim = own.rows.dtype, own.rows.shape[1]
    precision = {torch.bfloat16: "bf16", torch.float16: "tf32"}.get(dtype)
    rows_read = own.total * other.items * as_queries + other.total * own.items * as_keys
    return {
        "lists": rows_read * dim * own.rows.element_size() / _L2_BYTES_PER_SECOND,
        "product": 2.0 * own.total * other.total * dim
        / _FLOP_PER_SECOND[precision or float32_precision(dtype)],
    }  # fmt: skip


def strategy(
    own: TokenRows, other: TokenRows, as_queries: bool, as_keys: bool, skip_zeros: bool
) -> str:
    """The way that is expected to be quicker.

    So one direction goes by lists when its keys are longer than a break-even length, which only the
    two rates decide: 144 in bf16, 72 in float16, 22 in IEEE float32. Both together go by lists when
    1 / own length + 1 / other length is less than its inverse. (Lengths as far as they are known
    without a look: padding counts.)
    """
    if as_keys and items_at_once(own, other) == 0:
        return "product"
    if skip_zeros:  # the product would multiply the zeros
        return "lists"
    seconds = expected_seconds(own, other, as_queries, as_keys)
    return min(seconds, key=lambda way: seconds[way])


def side_gradient(
    own: TokenRows,
    other: TokenRows,
    gather: Direction | None,
    scatter: Direction | None,
    skip_zeros: bool,
    way: str,
) -> Tensor:
    """d own.rows: what they get as queries (gather) and as keys (scatter)."""
    gradient = torch.zeros_like(own.rows)
    if way == "product":
        product_gradient(own, other, gather, scatter, gradient)
        return gradient
    if scatter:
        scatter_gradient(own, other, *scatter, gradient)
    if gather:
        gather_gradient(own, other, *gather, gradient, scatter is not None, skip_zeros)
    return gradient


def backward(
    images: TokenRows,
    texts: TokenRows,
    t2i: Direction | None,
    i2t: Direction | None,
    need_image: bool,
    need_text: bool,
    skip_zeros: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of both sides' rows from (winners, dL/dS (images, texts)) of each direction.

    skip_zeros: many dL/dS are 0, so that it pays to look for the others first.
    """

    def gradient(
        own: TokenRows, other: TokenRows, gather: Direction | None, scatter: Direction | None
    ) -> Tensor:
        if own.total == 0 or other.total == 0 or own.items == 0 or other.items == 0:
            return torch.zeros_like(own.rows)
        way = strategy(own, other, gather is not None, scatter is not None, skip_zeros)
        return side_gradient(own, other, gather, scatter, skip_zeros, way)

    i2t_of_text = (i2t[0], i2t[1].T) if i2t else None
    t2i_of_text = (t2i[0], t2i[1].T) if t2i else None
    return (
        gradient(images, texts, i2t, t2i) if need_image else None,
        gradient(texts, images, t2i_of_text, i2t_of_text) if need_text else None,
    )
