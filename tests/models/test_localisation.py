"""Pointing accuracy, by hand and for both kinds of model."""

import pytest
import torch

from fastgoal_models.localisation import Pointing, pointing, pointing_of, points_into
from tests.models.small_models import coloured_records, small_clip


def test_the_brightest_cell_counts_and_ties_share():
    heat = torch.zeros(4, 4)
    heat[1, 2] = 1.0
    box = (48.0, 24.0, 72.0, 48.0)  # exactly that cell of 96 pixels
    assert points_into(heat, box, 96, 96) == (1.0, 1 / 16)
    assert points_into(heat.T, box, 96, 96) == (0.0, 1 / 16)
    assert points_into(torch.ones(4, 4), box, 96, 96) == (1 / 16, 1 / 16)
    assert points_into(torch.full((4, 4), float("nan")), box, 96, 96) == (0.0, 1 / 16)


def test_maps_lie_over_pictures_of_any_shape():
    heat = torch.tensor([[0.0, 1.0]])  # the right half
    assert points_into(heat, (100, 0, 200, 50), 200, 50) == (1.0, 0.5)
    assert points_into(heat, (0, 0, 100, 50), 200, 50) == (0.0, 0.5)


def test_means():
    assert pointing_of([]) == Pointing(0.0, 0.0, 0)
    assert pointing_of([(1.0, 0.5), (0.0, 0.25)]) == Pointing(0.5, 0.375, 2)


def test_a_plain_picture_is_pointed_at_by_positions_alone(tmp_path):
    found = pointing(small_clip(), coloured_records(tmp_path))
    assert found.sentences == 3 and found.chance == pytest.approx(0.25)
    # All three pictures have the same sentence and box; which patch wins may differ by colour.
    assert found.hits in (0.0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0)
