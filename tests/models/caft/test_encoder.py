"""CAFT's encoder against a plain restatement of its description, level by level.

Attention is written out, superpixels, farthest points and pooling are loops over tokens, one image
at a time. Of `fastgoal_models` and `fastgoal_kernels` only parameters, and the map of labels, are
taken.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgoal_models.caft import Caft
from fastgoal_models.caft import superpixels as makers

# Float32: sums of a few hundred terms through eleven blocks.
TOLERANCE = 1e-5


def close(got: Tensor, want: Tensor) -> None:
    """To 1e-5 of the largest entry."""
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE * float(want.abs().max()))


def randomised(model: Caft) -> Caft:
    """No gain, shift or statistic at its initial 1 or 0, so that none can be left out."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter += 0.1 * torch.randn(parameter.shape)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape))
    return model.eval()


# ---------------------------------------------------------------------------------------------
# The restatement
# ---------------------------------------------------------------------------------------------


def layer_norm(x: Tensor, norm: nn.LayerNorm, eps: float) -> Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * norm.weight + norm.bias


def attention(x: Tensor, attn, heads: int) -> Tensor:
    """(L, D), written out head by head."""
    dim = x.shape[1]
    width = dim // heads
    qkv = x @ attn.qkv.weight.T + attn.qkv.bias
    out = []
    for head in range(heads):
        q, k, v = (qkv[:, part * dim + head * width :][:, :width] for part in range(3))
        logits = q @ k.T / math.sqrt(width)
        weights = torch.exp(logits - logits.max(dim=1, keepdim=True).values)
        out.append(weights / weights.sum(dim=1, keepdim=True) @ v)
    return torch.cat(out, dim=1) @ attn.proj.weight.T + attn.proj.bias


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return x @ layer.weight.T + layer.bias


def block(x: Tensor, module, heads: int) -> Tensor:
    x = x + attention(layer_norm(x, module.norm1, 1e-6), module.attn, heads)
    hidden = gelu(linear(layer_norm(x, module.norm2, 1e-6), module.mlp.fc1))
    return x + linear(hidden, module.mlp.fc2)


def stem(image: Tensor, module) -> Tensor:
    x = image[None]
    layers = list(module.proj)
    for at, stride in zip(range(0, 12, 3), (2, 2, 2, 1), strict=True):
        conv, norm, _ = layers[at : at + 3]
        x = F.conv2d(x, conv.weight, stride=stride, padding=1)
        scale = norm.weight / torch.sqrt(norm.running_var + 1e-5)
        x = (x - norm.running_mean[:, None, None]) * scale[:, None, None]
        x = (x + norm.bias[:, None, None]).clamp_min(0)
    return F.conv2d(x, layers[12].weight, layers[12].bias)[0]


def superpixel_tokens(grid: Tensor, pixel_labels: Tensor, count: int) -> tuple[Tensor, list[bool]]:
    """Means over the cells of each superpixel; padding copies the nearest live one."""
    labels = pixel_labels[::8, ::8]
    across = pixel_labels.shape[1] // 16
    centroids, tokens = [], []
    for superpixel in range(count):
        where = (pixel_labels == superpixel).nonzero().float()
        row, column = divmod(superpixel, across)
        middle = torch.tensor([row * 16 + 7.5, column * 16 + 7.5])
        centroids.append(where.mean(dim=0) if len(where) else middle)
        cells = labels == superpixel
        tokens.append(grid[:, cells].mean(dim=1) if cells.any() else None)
    live = [token is not None for token in tokens]
    for superpixel in range(count):
        if not live[superpixel]:
            distances = [
                float((centroids[superpixel] - centroids[other]).square().sum())
                if live[other] else math.inf
                for other in range(count)
            ]  # fmt: skip
            tokens[superpixel] = tokens[distances.index(min(distances))]
    return torch.stack(tokens), live


def farthest(points: Tensor, samples: int) -> list[int]:
    """Of [mean; tokens], from the mean on, which is dropped; the lowest index wins ties."""
    chosen = [0]
    while len(chosen) < samples + 1:
        best, best_distance = 0, -1.0
        for candidate in range(len(points)):
            nearest = min(float((points[candidate] - points[c]).square().sum()) for c in chosen)
            if nearest > best_distance:
                best, best_distance = candidate, nearest
        chosen.append(best)
    return [index - 1 for index in chosen[1:]]


def pool(cls: Tensor, tokens: Tensor, live: list[bool], module, heads: int):
    part = module.pool_block
    mean = tokens[torch.tensor(live)].mean(dim=0)
    filled = torch.stack([t if alive else mean for t, alive in zip(tokens, live, strict=True)])
    sampled = farthest(torch.cat([mean[None], filled]), part.num_tokens)

    nodes = layer_norm(tokens, part.centroid_fc.norm, 1e-6)
    nodes = tokens + attention(nodes, part.centroid_fc.attn, heads)
    nodes = nodes - nodes.mean(dim=0) + part.centroid_fc.bias
    shares = torch.zeros(len(tokens), len(sampled))
    for i, node in enumerate(nodes):
        for k, index in enumerate(sampled):
            cosine = node @ nodes[index] / (node.norm() * nodes[index].norm())
            shares[i, k] = 5 * cosine
    shares = shares.exp() / shares.exp().sum(dim=1, keepdim=True)

    def fc1(x: Tensor) -> Tensor:
        return gelu(linear(layer_norm(x, part.fc1[0], 1e-5), part.fc1[1]))

    def fc2(x: Tensor) -> Tensor:
        return linear(layer_norm(x, part.fc2[0], 1e-5), part.fc2[1])

    wide, pooled = fc1(tokens), []
    for k, index in enumerate(sampled):
        mixed = sum(shares[i, k] * wide[i] for i in range(len(tokens))) / shares[:, k].sum()
        pooled.append(fc2(mixed) + tokens[index])
    return fc2(fc1(cls)) + cls, torch.stack(pooled), shares


@torch.no_grad()
def restated(model: Caft, image: Tensor, pixel_labels: Tensor) -> dict[str, Tensor]:
    """All levels of one image."""
    visual, config = model.visual, model.config.vision
    side = config.image_size // 8
    grid = stem(image, visual.patch_embed)
    grid = grid + visual.pos_embed[0].T.reshape(config.width, side, side)
    tokens, live = superpixel_tokens(grid, pixel_labels, (side // 2) ** 2)
    found = {"tokens": tokens, "live": torch.tensor(live)}
    cls, first = (visual.cls_token + visual.pe_token)[0, 0], 0
    for stage, depth in enumerate(config.layers):
        x = torch.cat([cls[None], tokens])
        for module in visual.blocks[first : first + depth]:
            x = block(x, module, config.heads)
        first += depth
        cls, tokens = x[0], x[1:]
        if stage == 1:
            fine = layer_norm(x, visual.norm_fine, 1e-6) @ model.image_post.proj
            found |= {"fine_features": fine[0], "fine_tokens": fine[1:]}
        if stage < len(config.tokens):
            cls, tokens, shares = pool(cls, tokens, live, visual.pools[stage], config.heads)
            live = [True] * len(tokens)
            found[f"shares {stage}"] = shares
    whole = layer_norm(cls, visual.norm, 1e-6) @ model.image_post_coarse.proj
    return found | {"whole_features": whole}


# ---------------------------------------------------------------------------------------------
# Ours
# ---------------------------------------------------------------------------------------------


def smooth(images: int, size: int) -> Tensor:
    coarse = torch.randn(images, 3, size // 8, size // 8)
    return F.interpolate(coarse, size=(size, size), mode="bicubic")


# CAFT-B's depth and tokens at its input size, thinner: the loops take their time.
THIN = {
    "embed_dim": 32, "pool_heads": 2,
    "vision_cfg": {"image_size": 224, "width": 48, "heads": 3, "layers": [3, 3, 3, 2],
                   "tokens": [64, 32, 16]},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2,
                 "parts": 4, "whole_layers": 2, "adapter_width": 21},
}  # fmt: skip
SMALL = THIN | {
    "vision_cfg": {"image_size": 64, "width": 48, "heads": 3, "layers": [2, 1, 1, 1],
                   "tokens": [9, 5, 2]},
}  # fmt: skip


def compare(model: Caft, images: Tensor) -> None:
    with torch.no_grad():
        got = model.encode_image(images, with_hierarchy=True)
        segments = model.visual.superpixels(images)
        grid = model.visual.patch_embed(images)
        tokens = segments.means(grid + model.visual.positions(grid))
    labels = model_labels(model, images)
    for at, image in enumerate(images):
        want = restated(model, image, labels[at])
        assert torch.equal(segments.live[at], want["live"])
        close(tokens[at], want["tokens"])
        for stage, shares in enumerate(got.hierarchy.assignments):
            close(shares[at], want[f"shares {stage}"])
        for name in ("fine_tokens", "fine_features", "whole_features"):
            close(getattr(got, name)[at], want[name])


def model_labels(model: Caft, images: Tensor) -> Tensor:
    """The map that `superpixels` starts from; its makers have tests of their own."""
    if model.visual.kind == "grid":
        return makers.grid_labels(images)
    if model.visual.kind == "slic":
        return makers.slic_labels(images)
    return makers.sfcn_labels(model.visual.superpixel_generator, images)


@pytest.mark.parametrize("kind", ["grid", "slic", "sfcn"])
def test_the_encoder_is_its_description(kind):
    torch.manual_seed(3)
    model = randomised(Caft.create(SMALL, superpixels=kind))
    compare(model, smooth(3, 64))


@pytest.mark.slow
def test_at_the_published_depth_and_size():
    torch.manual_seed(4)
    model = randomised(Caft.create(THIN, superpixels="slic"))
    compare(model, smooth(1, 224))


def test_the_text_side_is_its_description():
    torch.manual_seed(5)
    model = randomised(Caft.create(SMALL, superpixels="grid"))
    texts = torch.randint(1, 400, (2, 6, 9))
    ends = torch.randint(4, 9, (2, 6))
    texts.scatter_(2, ends[..., None], 49407)

    def causal(x: Tensor, tower) -> Tensor:
        for module in tower.resblocks:
            normal = layer_norm(x, module.ln_1, 1e-5)
            dim, heads = x.shape[1], module.attn.num_heads
            width = dim // heads
            qkv = normal @ module.attn.in_proj_weight.T + module.attn.in_proj_bias
            out = []
            for head in range(heads):
                q, k, v = (qkv[:, part * dim + head * width :][:, :width] for part in range(3))
                logits = q @ k.T / math.sqrt(width)
                for row in range(len(x)):
                    logits[row, row + 1 :] = -math.inf
                out.append(logits.softmax(dim=1) @ v)
            x = x + linear(torch.cat(out, dim=1), module.attn.out_proj)
            hidden = gelu(linear(layer_norm(x, module.ln_2, 1e-5), module.mlp.c_fc))
            x = x + linear(hidden, module.mlp.c_proj)
        return x

    with torch.no_grad():
        got = model.encode_text(texts)
        for n in range(2):
            parts = []
            for text, end in zip(texts[n], ends[n], strict=True):
                x = model.token_embedding.weight[text] + model.positional_embedding[:9]
                parts.append(layer_norm(causal(x, model.transformer)[end], model.ln_final, 1e-5))
            close(got.part_features[n], torch.stack(parts) @ model.text_post.proj)
            above = model.paragraph_encoder
            x = torch.stack(parts[:4])
            hidden = gelu(linear(x, above.adapter.mlp.c_fc))
            x = x + above.adapter.ls.gamma * linear(hidden, above.adapter.mlp.c_proj)
            x = torch.cat([x, above.cls_embed[0]]) + above.positional_embedding[0]
            whole = layer_norm(causal(x, above.transformer)[-1], above.ln_final, 1e-5)
            close(got.whole_features[n], whole @ model.text_post_coarse.proj)
