"""The stretch of CLIP's text positions, against rows computed by hand."""

import pytest
import torch

from fastgoal_models import stretch_positional_embedding


def test_rows_by_hand():
    kept = [float(i * i) for i in range(20)]
    positions = torch.tensor([*kept, 10.0, 14.0, 6.0])[:, None]
    between = [10, 11, 12, 13, 14, 12, 10, 8]
    beyond = [6, 4, 2, 0]  # the last step is -8: it goes on by a quarter of it, three times
    stretched = stretch_positional_embedding(positions, 4 * 23 - 60)
    assert stretched[:, 0].tolist() == [*kept, *between, *beyond]


def test_77_become_248():
    positions = torch.randn(77, 5, dtype=torch.float64)
    stretched = stretch_positional_embedding(positions)
    assert stretched.shape == (248, 5)
    assert torch.equal(stretched[:20], positions[:20])
    assert torch.equal(stretched[20::4], positions[20:])
    p = positions
    for row, by_hand in {
        21: 0.75 * p[20] + 0.25 * p[21],
        22: 0.5 * p[20] + 0.5 * p[21],
        23: 0.25 * p[20] + 0.75 * p[21],
        242: 0.5 * p[75] + 0.5 * p[76],
        245: p[76] + (p[76] - p[75]) / 4,
        246: p[76] + (p[76] - p[75]) / 2,
        247: p[76] + (p[76] - p[75]) * 3 / 4,
    }.items():
        # float64: a different order of the same few operations
        torch.testing.assert_close(stretched[row], by_hand, rtol=1e-12, atol=1e-12)


def test_shorter_contexts_are_the_first_rows():
    positions = torch.randn(77, 4)
    whole = stretch_positional_embedding(positions)
    assert torch.equal(stretch_positional_embedding(positions, 160), whole[:160])


def test_stretched_ones_are_left_alone():
    positions = torch.randn(248, 4)
    assert stretch_positional_embedding(positions, 248) is positions
    assert stretch_positional_embedding(positions[:77], 77).shape == (77, 4)


def test_dtype_is_kept_and_rounded_once():
    positions = torch.randn(77, 4).bfloat16()
    stretched = stretch_positional_embedding(positions)
    assert stretched.dtype == torch.bfloat16
    assert torch.equal(stretched, stretch_positional_embedding(positions.float()).bfloat16())


@pytest.mark.parametrize(
    "shape, context_length, message",
    [
        ((77, 4), 249, "77 .* to 248"),
        ((77, 4), 76, "77 .* to 248"),
        ((21, 4), 24, "21 positions can not be stretched"),
        ((77,), 248, r"\(positions, width\)"),
    ],
)
def test_refused(shape, context_length, message):
    with pytest.raises(ValueError, match=message):
        stretch_positional_embedding(torch.zeros(shape), context_length)


def test_integers_are_refused():
    with pytest.raises(ValueError, match="int64"):
        stretch_positional_embedding(torch.zeros(77, 4, dtype=torch.long))
