"""Soft cluster pooling in Triton: a softmax and the product that it is a factor of, in one pass.

With a = softmax over the clusters m of a token l, s_m = sum_l a_lm, g = dL/dout, q_lm = <g_m, x_l>:

    pool_kernel              out_m = sum_l a_lm x_l / s_m
    gradient_products_kernel q, and parts of t_m = sum_l a_lm q_lm / s_m = <g_m, out_m>
    logits_gradient_kernel   dL/da_lm = (q_lm - t_m) / s_m, and through the softmax
    tokens_gradient_kernel   dL/dx_l = sum_m a_lm g_m / s_m

Each makes its weights anew: of 256 images with 197 tokens in 65 clusters, D 768 in 16 bits, the
forward reads 77 MB of tokens, 13 MB of float32 logits once for each block of channels, from L2, and
writes 26 MB; weights of its own would be another 26 MB. The backward holds q, 13 MB. t is not taken
from out, whose rounding to 16 bits it would inherit. Each block of tokens leaves a partial sum of
t; they are added in a fixed order: no atomics.

Weights are float32 and keep their digits beside 16-bit tokens: both are split into bfloat16 parts,
whose products with each other, but for those of two remainders, lose 2^-16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import INTERPRETED
from .compile_cases import CompileCase
from .item_rows import item_rows
from .tiles_triton import Config, dot, float32_precision, tile_case

# Sizes change from batch to batch; specialising on them would recompile.
_UNSPECIALIZED = ["rows_per_item", "num_tokens", "num_clusters"]

# Within an item places are 32-bit numbers, of which a tile of addresses takes half the registers.


@triton.jit
def _weights_dot(weights, x, total, PRECISION: tl.constexpr):
    """total + weights @ x, of float32 weights."""
    if x.dtype == tl.float32:
        return dot(weights, x, total, PRECISION)
    high = weights.to(tl.bfloat16)
    low = (weights - high.to(tl.float32)).to(tl.bfloat16)
    if x.dtype == tl.bfloat16:
        return dot(low, x, dot(high, x, total, PRECISION), PRECISION)
    x_high = x.to(tl.bfloat16)  # the 11 digits of a float16 are two bfloat16, exactly
    x_low = (x.to(tl.float32) - x_high.to(tl.float32)).to(tl.bfloat16)
    total = dot(high, x_low, dot(high, x_high, total, PRECISION), PRECISION)
    return dot(low, x_high, total, PRECISION)


@triton.jit
def _logits(logits, row, m, num_tokens, num_clusters):
    """float32 logits of tokens row and clusters m, whatever axes those lie along; -inf outside."""
    inside = (row < num_tokens) & (m < num_clusters)
    return tl.load(logits + row * num_clusters + m, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def _weights(logits, tops, totals, row, m, num_tokens, num_clusters):
    """(tokens, clusters) weights from the saved sums; 0 outside."""
    inside = row < num_tokens
    top = tl.load(tops + row, mask=inside, other=0.0)
    total = tl.load(totals + row, mask=inside, other=1.0)
    z = _logits(logits, row[:, None], m[None, :], num_tokens, num_clusters)
    return tl.exp(z - top[:, None]) / total[:, None]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def pool_kernel(
    tokens, logits, pooled, tops, totals, masses, rows_per_item, num_tokens, num_clusters,
    D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of clusters by a block of channels of one item. ONE_BLOCK: it has all clusters."""
    channel_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    cluster_blocks = tl.cdiv(num_clusters, BLOCK_M)
    program = tl.program_id(0)
    channel_block = program % channel_blocks
    cluster_block = program // channel_blocks % cluster_blocks
    item = (program // channel_blocks // cluster_blocks).to(tl.int64)
    tokens += item * rows_per_item * D
    logits += item * num_tokens * num_clusters
    m = cluster_block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = channel_block * BLOCK_D + tl.arange(0, BLOCK_D)
    sums = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    mass = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for first in range(0, num_tokens, BLOCK_L):
        row = first + tl.arange(0, BLOCK_L)
        inside = row < num_tokens
        z = _logits(logits, row[None, :], m[:, None], num_tokens, num_clusters)
        if ONE_BLOCK:
            top = tl.max(z, axis=0)
            total = tl.sum(tl.exp(z - top[None, :]), axis=0)
        else:
            top = tl.full((BLOCK_L,), float("-inf"), dtype=tl.float32)
            total = tl.zeros((BLOCK_L,), dtype=tl.float32)
            for other in range(0, num_clusters, BLOCK_M):
                k = other + tl.arange(0, BLOCK_M)
                part = _logits(logits, row[None, :], k[:, None], num_tokens, num_clusters)
                new_top = tl.maximum(top, tl.max(part, axis=0))
                safe = tl.where(new_top == float("-inf"), 0.0, new_top)
                total = total * tl.exp(top - safe) + tl.sum(tl.exp(part - safe[None, :]), axis=0)
                top = new_top
        weights = tl.exp(z - top[None, :]) / total[None, :]
        weights = tl.where(inside[None, :], weights, 0.0)
        x = tl.load(
            tokens + row[:, None] * D + d[None, :],
            mask=inside[:, None] & (d < D)[None, :], other=0.0,
        )  # fmt: skip
        sums = _weights_dot(weights, x, sums, PRECISION)
        mass += tl.sum(weights, axis=1)
        if (cluster_block == 0) & (channel_block == 0):
            tl.store(tops + item * num_tokens + row, top, mask=inside)
            tl.store(totals + item * num_tokens + row, total, mask=inside)
    if channel_block == 0:
        tl.store(masses + item * num_clusters + m, mass, mask=m < num_clusters)
    pooled += item * num_clusters * D
    tl.store(
        pooled + m[:, None] * D + d[None, :],
        (sums / mass[:, None]).to(pooled.dtype.element_ty),
        mask=(m < num_clusters)[:, None] & (d < D)[None, :],
    )


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def gradient_products_kernel(
    grads, tokens, logits, tops, totals, products, parts, rows_per_item, num_tokens, num_clusters,
    D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of a block of tokens with a block of gradients, and their weighted sums."""
    token_blocks = tl.cdiv(num_tokens, BLOCK_L)
    cluster_blocks = tl.cdiv(num_clusters, BLOCK_M)
    program = tl.program_id(0)
    cluster_block = program % cluster_blocks
    token_block = program // cluster_blocks % token_blocks
    item = (program // cluster_blocks // token_blocks).to(tl.int64)
    row = token_block * BLOCK_L + tl.arange(0, BLOCK_L)
    m = cluster_block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    x_places = tokens + item * rows_per_item * D + (row[:, None] * D + d[None, :])
    g_places = grads + item * num_clusters * D + (m[None, :] * D + d[:, None])
    q = tl.zeros((BLOCK_L, BLOCK_M), dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        given = first + d < D
        x = tl.load(x_places + first, mask=(row < num_tokens)[:, None] & given[None, :], other=0.0)
        g = tl.load(g_places + first, mask=(m < num_clusters)[None, :] & given[:, None], other=0.0)
        q = dot(x, g, q, PRECISION)
    inside = (row < num_tokens)[:, None] & (m < num_clusters)[None, :]
    products += item * num_tokens * num_clusters
    tl.store(products + row[:, None] * num_clusters + m[None, :], q, mask=inside)
    logits += item * num_tokens * num_clusters
    tops += item * num_tokens
    totals += item * num_tokens
    weights = _weights(logits, tops, totals, row, m, num_tokens, num_clusters)
    part = tl.sum(tl.where(inside, weights * q, 0.0), axis=0)
    tl.store(parts + (item * token_blocks + token_block) * num_clusters + m, part,
             mask=m < num_clusters)  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def logits_gradient_kernel(
    products, means, logits, tops, totals, masses, logits_grad, num_tokens, num_clusters,
    BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of tokens' logits; `means` are t."""
    token_blocks = tl.cdiv(num_tokens, BLOCK_L)
    program = tl.program_id(0)
    item = (program // token_blocks).to(tl.int64)
    row = program % token_blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    products += item * num_tokens * num_clusters
    logits += item * num_tokens * num_clusters
    logits_grad += item * num_tokens * num_clusters
    tops += item * num_tokens
    totals += item * num_tokens
    means += item * num_clusters
    masses += item * num_clusters
    through = tl.zeros((BLOCK_L,), dtype=tl.float32)
    for number in range(0, 2 * tl.cdiv(num_clusters, BLOCK_M)):  # twice over the clusters
        first = number % tl.cdiv(num_clusters, BLOCK_M) * BLOCK_M
        m = first + tl.arange(0, BLOCK_M)
        inside = (row < num_tokens)[:, None] & (m < num_clusters)[None, :]
        places = row[:, None] * num_clusters + m[None, :]
        weights = _weights(logits, tops, totals, row, m, num_tokens, num_clusters)
        q = tl.load(products + places, mask=inside, other=0.0)
        mean = tl.load(means + m, mask=m < num_clusters, other=0.0)
        mass = tl.load(masses + m, mask=m < num_clusters, other=1.0)
        gradient = (q - mean[None, :]) / mass[None, :]
        if number < tl.cdiv(num_clusters, BLOCK_M):
            through += tl.sum(weights * gradient, axis=1)
        else:
            gradient = weights * (gradient - through[:, None])
            tl.store(logits_grad + places, gradient.to(logits_grad.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def tokens_gradient_kernel(
    grads, logits, tops, totals, masses, tokens_grad, num_tokens, num_clusters,
    D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of tokens by a block of channels."""
    channel_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    token_blocks = tl.cdiv(num_tokens, BLOCK_L)
    program = tl.program_id(0)
    channel_block = program % channel_blocks
    token_block = program // channel_blocks % token_blocks
    item = (program // channel_blocks // token_blocks).to(tl.int64)
    logits += item * num_tokens * num_clusters
    tops += item * num_tokens
    totals += item * num_tokens
    masses += item * num_clusters
    row = token_block * BLOCK_L + tl.arange(0, BLOCK_L)
    d = channel_block * BLOCK_D + tl.arange(0, BLOCK_D)
    grads += item * num_clusters * D
    tokens_grad += item * num_tokens * D
    gradient = tl.zeros((BLOCK_L, BLOCK_D), dtype=tl.float32)
    for first in range(0, num_clusters, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        mass = tl.load(masses + m, mask=m < num_clusters, other=1.0)
        weights = _weights(logits, tops, totals, row, m, num_tokens, num_clusters)
        g = tl.load(
            grads + m[:, None] * D + d[None, :],
            mask=(m < num_clusters)[:, None] & (d < D)[None, :], other=0.0,
        )  # fmt: skip
        gradient = _weights_dot(weights / mass[None, :], g, gradient, PRECISION)
    tl.store(
        tokens_grad + row[:, None] * D + d[None, :],
        gradient.to(tokens_grad.dtype.element_ty),
        mask=(row < num_tokens)[:, None] & (d < D)[None, :],
    )


# ---------------------------------------------------------------------------------------------
# Launcher
# ---------------------------------------------------------------------------------------------


def _tile(kernel: str, dtype: torch.dtype, num_clusters: int) -> tuple[Config, dict[str, int]]:
    """What runs a kernel, and its blocks: of tokens, clusters, channels."""
    if INTERPRETED:
        blocks = 16, 16, 16
    elif kernel == "logits":
        blocks = 16, 64 if num_clusters <= 64 else 128, 0
    elif dtype == torch.float32:  # without the matrix unit its factors pass through registers
        blocks = {"pool": (16, 64, 64), "products": (32, 64, 32), "tokens": (32, 32, 64)}[kernel]
    else:
        clusters = 64 if num_clusters <= 64 else 128
        # float16 tokens are two bfloat16 each, and leave no registers for 128 clusters.
        pooled = 64 if dtype == torch.float16 else clusters
        blocks = {
            "pool": (32, pooled, 128), "products": (64, clusters, 64), "tokens": (64, 32, 128)
        }[kernel]  # fmt: skip
    # A factor that is made on the way is not loaded ahead; the products have nothing but loads. And
    # Triton 3.2 can not compile this one in float32 with loads ahead.
    single = kernel == "tokens" and dtype == torch.float32
    config = Config(
        *blocks,
        num_warps=4 if kernel == "logits" else 8,
        num_stages=3 if kernel == "products" else 1 if single else 2,
        maxnreg=192 if kernel == "pool" and dtype == torch.float16 else None,
    )
    names = dict(zip(("BLOCK_L", "BLOCK_M", "BLOCK_D"), blocks, strict=True))
    return config, {name: size for name, size in names.items() if size}


def forward(tokens: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(means, tops, totals, masses): see `cluster_pool.cluster_pool`."""
    batch, length, dim = tokens.shape
    clusters = logits.shape[2]
    pooled = tokens.new_empty((batch, clusters, dim))
    sizes = (batch, length), (batch, length), (batch, clusters)
    tops, totals, masses = (tokens.new_empty(size, dtype=torch.float32) for size in sizes)
    if pooled.numel():
        tokens, rows_per_item = item_rows(tokens)
        config, blocks = _tile("pool", tokens.dtype, clusters)
        programs = triton.cdiv(clusters, blocks["BLOCK_M"]) * triton.cdiv(dim, blocks["BLOCK_D"])
        pool_kernel[(batch * programs,)](
            tokens, logits.contiguous(), pooled, tops, totals, masses,
            rows_per_item, length, clusters, D=dim, ONE_BLOCK=clusters <= blocks["BLOCK_M"],
            PRECISION=float32_precision(tokens.dtype), **blocks, **config.launch,
        )  # fmt: skip
    return pooled, tops, totals, masses


def backward(
    upstream: Tensor,
    tokens: Tensor,
    logits: Tensor,
    tops: Tensor,
    totals: Tensor,
    masses: Tensor,
    need_tokens: bool,
    need_logits: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of (tokens, logits); one that is not needed has no elements."""
    batch, length, dim = tokens.shape
    clusters = logits.shape[2]
    tokens_grad = tokens.new_empty(tokens.shape if need_tokens else 0)
    logits_grad = logits.new_empty(logits.shape if need_logits else 0)
    if not (batch and length and clusters and dim):
        return tokens_grad.zero_(), logits_grad.zero_()
    upstream, logits = upstream.contiguous(), logits.contiguous()
    precision = float32_precision(tokens.dtype)
    if need_logits:
        tokens, rows_per_item = item_rows(tokens)
        config, blocks = _tile("products", tokens.dtype, clusters)
        token_blocks = triton.cdiv(length, blocks["BLOCK_L"])
        programs = token_blocks * triton.cdiv(clusters, blocks["BLOCK_M"])
        products = tops.new_empty((batch, length, clusters))
        parts = tops.new_empty((batch, token_blocks, clusters))
        gradient_products_kernel[(batch * programs,)](
            upstream, tokens, logits, tops, totals, products, parts,
            rows_per_item, length, clusters, D=dim, PRECISION=precision, **blocks, **config.launch,
        )  # fmt: skip
        config, blocks = _tile("logits", tokens.dtype, clusters)
        logits_gradient_kernel[(batch * triton.cdiv(length, blocks["BLOCK_L"]),)](
            products, parts.sum(dim=1) / masses, logits, tops, totals, masses, logits_grad,
            length, clusters, **blocks, **config.launch,
        )  # fmt: skip
    if need_tokens:
        config, blocks = _tile("tokens", tokens.dtype, clusters)
        programs = triton.cdiv(length, blocks["BLOCK_L"]) * triton.cdiv(dim, blocks["BLOCK_D"])
        tokens_gradient_kernel[(batch * programs,)](
            upstream, logits, tops, totals, masses, tokens_grad, length, clusters,
            D=dim, PRECISION=precision, **blocks, **config.launch,
        )  # fmt: skip
    return tokens_grad, logits_grad


# ---------------------------------------------------------------------------------------------
# What gets compiled
# ---------------------------------------------------------------------------------------------

_KERNELS = {
    "pool": pool_kernel, "products": gradient_products_kernel,
    "logits": logits_gradient_kernel, "tokens": tokens_gradient_kernel,
}  # fmt: skip
_OF_TOKENS = ("tokens", "pooled", "grads", "tokens_grad")


def _pointer_type(name: str) -> str | None:
    return None if name in _UNSPECIALIZED else "tokens" if name in _OF_TOKENS else "*fp32"


def compile_cases(arch: int) -> list[CompileCase]:
    """Each kernel for the most clusters in bfloat16, and the other ways to multiply."""
    wanted = [(kernel, torch.bfloat16, 768, 65) for kernel in _KERNELS]
    wanted += [(kernel, torch.float32, 500, 300) for kernel in ("pool", "products", "tokens")]
    wanted += [("pool", torch.float32, 768, 33), ("tokens", torch.float16, 768, 33)]
    wanted += [("pool", torch.float16, 768, 33), ("pool", torch.float16, 500, 300)]
    cases = []
    for name, dtype, dim, clusters in wanted:
        config, blocks = _tile(name, dtype, clusters)
        constexprs: dict[str, object] = dict(blocks)
        if name != "logits":
            constexprs |= dict(D=dim, PRECISION="ieee")
        if name == "pool":
            constexprs |= dict(ONE_BLOCK=clusters <= blocks["BLOCK_M"])
        cases.append(
            tile_case(
                _KERNELS[name], f"D={dim} M={clusters}", dtype, config, constexprs,
                _pointer_type, name != "logits",
            )
        )  # fmt: skip
    return cases
