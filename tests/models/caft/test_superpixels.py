"""Superpixels: the three makers, the means over them, and the padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgoal_models.caft.sfcn import Sfcn
from fastgoal_models.caft.superpixels import (
    grid_labels,
    sfcn_labels,
    slic_labels,
    superpixels,
)
from fastgoal_models.demo.photographs import load_photographs
from fastgoal_models.pictures import image_tensor, load_image


def test_the_grid_is_the_cells():
    labels = grid_labels(torch.zeros(2, 3, 48, 32))
    assert labels.shape == (2, 48, 32)
    assert torch.equal(labels[0, ::16, ::16], torch.arange(6).view(3, 2))
    assert (labels[:, 15, 15] == 0).all() and (labels[:, 16, 15] == 2).all()


def test_slic_follows_a_border_that_cells_do_not():
    image = torch.full((1, 3, 64, 64), -1.0)
    image[:, :, :, 27:] = 1.0  # between two columns of cells
    labels = slic_labels(image)[0]
    across = set(labels[:, :27].unique().tolist()) & set(labels[:, 27:].unique().tolist())
    assert not across
    assert set(labels.flatten().tolist()) <= set(range(16))


def boundary(labels: np.ndarray) -> np.ndarray:
    edge = np.zeros(labels.shape, dtype=bool)
    edge[:-1] |= labels[:-1] != labels[1:]
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    return edge


def boundary_recall(labels: np.ndarray, truth: np.ndarray, reach: int = 2) -> float:
    """The share of true boundary pixels that have one of `labels` within `reach` pixels."""
    near = torch.from_numpy(boundary(labels)).float()[None, None]
    near = torch.nn.functional.max_pool2d(near, 2 * reach + 1, 1, reach)[0, 0].numpy() > 0
    return float(near[boundary(truth)].mean())


@pytest.mark.slow
def test_slic_finds_the_borders_that_scikit_images_does():
    """On the demo photographs: borders of a coarse, independent segmentation (felzenszwalb).

    Ours does without the conversion to Lab and without enforcing that segments hang together, so
    its own borders are longer, which alone would raise the recall: their length is looked at, too.
    """
    segmentation = pytest.importorskip("skimage.segmentation")
    recalls, lengths = [], []
    for photograph in load_photographs():
        image = load_image(photograph.path).resize((224, 224))
        pixels = np.asarray(image) / 255.0
        truth = segmentation.felzenszwalb(pixels, scale=300, sigma=0.8, min_size=200)
        if not boundary(truth).any():
            continue
        normalised = image_tensor(image, 224)[None]
        maps = (
            slic_labels(normalised)[0].numpy(),
            segmentation.slic(pixels, n_segments=196, compactness=10, start_label=0),
            grid_labels(normalised)[0].numpy(),
        )
        recalls.append([boundary_recall(labels, truth) for labels in maps])
        lengths.append([boundary(labels).mean() for labels in maps])
    assert len(recalls) >= 10
    ours, theirs, cells = np.mean(recalls, axis=0)
    assert ours > theirs - 0.05 and ours > cells + 0.1, (ours, theirs, cells)
    our_length, their_length, _ = np.mean(lengths, axis=0)
    assert our_length < 1.5 * their_length, (our_length, their_length)


def test_the_network_chooses_among_nine_cells():
    torch.manual_seed(0)
    network = Sfcn().eval()
    with torch.no_grad():  # so that the pixels, not the biases, decide
        for parameter in network.parameters():
            parameter *= 4.0 if parameter.ndim > 1 else 0.1
    images = torch.randn(2, 3, 64, 48)
    labels = sfcn_labels(network, images)
    own = grid_labels(images)
    down, across = (labels // 3 - own // 3).abs(), (labels % 3 - own % 3).abs()
    assert down.max() <= 1 and across.max() <= 1
    assert len(labels.unique()) > 3
    assert not torch.equal(labels, sfcn_labels(network, images, published=True))
    # Each channel stands for its neighbour; at the border the nearest cell that exists.
    with torch.no_grad():
        network.pred_mask0.weight.zero_()
        network.pred_mask0.bias.zero_()
        network.pred_mask0.bias[5] = 1.0  # the cell to the right
    right = sfcn_labels(network, images)
    assert torch.equal(right, own + (own % 3 < 2).long())


def means(features: Tensor, labels: Tensor) -> Tensor:
    return superpixels(labels).means(features)


def test_means_and_padding_of_a_hand_made_map():
    """A map of 2 x 2 cells, in which label 3 has pixels but no sampled one, and 2 has none."""
    labels = torch.zeros(1, 32, 32, dtype=torch.long)
    labels[:, :, 16:] = 1
    labels[:, 17:19, 17:19] = 3
    found = superpixels(labels)
    assert found.live.tolist() == [[True, True, False, False]]
    assert found.labels.tolist() == [[[0, 0, 1, 1]] * 4]
    # Label 2's own cell is below on the left, and 3 lies on the right.
    assert found.source.tolist() == [[0, 1, 0, 1]]
    features = torch.arange(16.0).view(1, 1, 4, 4).requires_grad_()
    tokens = found.means(features)
    assert tokens[0, :, 0].tolist() == [6.5, 8.5, 6.5, 8.5]
    tokens[0, 2].sum().backward()
    assert features.grad is not None
    assert features.grad[0, 0, :, 0].tolist() == [0.125] * 4
    assert features.grad[0, 0, :, 2].tolist() == [0.0] * 4


def test_equal_inputs_give_equal_bits():
    torch.manual_seed(1)
    images = torch.randn(2, 3, 96, 64)
    features = torch.randn(2, 5, 12, 8)
    one, other = (means(features, slic_labels(images)) for _ in range(2))
    assert torch.equal(one, other)
    alone = means(features[1:], slic_labels(images[1:]))
    torch.testing.assert_close(alone, one[1:])
