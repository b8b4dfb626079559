"""The instruments: what they count, and what they must not."""

import pytest
import torch

from benchmarks import measure
from benchmarks.baselines import exact_scores, filip_loss, scores_amax, scores_max
from benchmarks.workloads import Workload, make_inputs, useful_flop
from fastgoal_kernels import reference

CPU = torch.device("cpu")
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
MB = 2**20


@pytest.mark.parametrize("device", DEVICES)
def test_memory_is_the_peak_of_temporaries_without_what_is_returned(device):
    x = torch.ones(MB // 4, device=device)  # 1 MB, there before: not counted

    def call():
        a = x + 1
        b = a + 1
        del a
        return b * 2  # at its peak b and the result are alive, or a and b

    extra = measure.measure_memory(call, torch.device(device))
    # On a CPU the returned storage is left out of the running sum, so a and b count; a GPU's
    # allocator only knows totals, of which the returned megabyte is subtracted.
    # Python scalars become tensors of a few bytes on the way.
    assert extra == pytest.approx(2 * MB if device == "cpu" else MB, abs=1024)


def test_memory_sees_inside_a_custom_operator_and_the_backward_pass():
    @torch.library.custom_op("fastgoal_test::wasteful", mutates_args=())
    def wasteful(x: torch.Tensor) -> torch.Tensor:
        scratch = torch.empty(4 * MB // 4)
        return x + scratch.zero_()[0]

    x = torch.ones(MB // 4)
    assert 4 * MB <= measure.measure_memory(lambda: wasteful(x), CPU) < 4.1 * MB

    w = torch.ones(MB // 4, requires_grad=True)

    def step():
        return torch.autograd.grad((w.exp() * w).sum(), [w])

    # exp(w) is kept for the backward; there its gradient and the sum of two join it.
    extra = measure.measure_memory(step, CPU)
    assert 2 * MB <= extra <= 4.1 * MB


def test_memory_of_a_reused_address_belongs_to_the_returned_tensor_only_the_last_time():
    x = torch.ones(MB // 4)

    def call():
        for _ in range(3):
            y = x + 1
            del y
        return x + 1

    assert measure.measure_memory(call, CPU) == pytest.approx(MB, abs=1024)


def test_time_is_a_median_with_its_spread():
    timing = measure.Timing.of([5.0, 1.0, 2.0, 3.0, 100.0, 4.0])
    assert timing == measure.Timing(3.5, 2.0, 5.0, 1.0, 6)


@pytest.mark.parametrize("device", DEVICES)
def test_time_calls_every_copy_and_respects_the_number_of_repeats(device):
    calls = [0, 0, 0]

    def counting(which):
        def call():
            calls[which] += 1
            torch.ones(10, device=device).sum()

        return call

    timing = measure.measure_time(
        [counting(i) for i in range(3)], torch.device(device), seconds=0.0, min_repeats=6
    )
    assert timing.repeats == 6
    assert calls == [2 + 2, 2 + 1, 2]  # two to warm up, one to gauge, six in turn
    assert 0 < timing.low_ms <= timing.median_ms <= timing.high_ms


def test_rivals_take_turns():
    order = []
    timings = measure.measure_in_turns(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3
    )
    assert order == ["a", "b"] * 4  # one round to warm up
    assert timings["a"].repeats == timings["b"].repeats == 3


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("score", [scores_amax, scores_max, exact_scores])
def test_baselines_mean_what_the_reference_means(score, masked):
    layout, fill = ("padded", 0.55) if masked else ("full", 1.0)
    work = Workload(
        "maxsim_contrastive_loss", "both", "inference", 4, 4, 9, 7, 16, "float32", layout, fill
    )
    inputs = make_inputs(work, CPU)
    captions = inputs.captions
    found = score(inputs.images, captions.tokens, work.directions, captions.mask)
    wide = inputs.images.double(), captions.tokens.double()
    truth = reference.maxsim_scores(*wide, text_mask=captions.mask, direction="both")
    for direction, expected in zip(("text_to_image", "image_to_text"), truth, strict=True):
        torch.testing.assert_close(found[direction].double(), expected, rtol=1e-5, atol=1e-6)
    loss = filip_loss(found, 5.0)
    expected = reference.maxsim_contrastive_loss(*wide, 5.0, text_mask=captions.mask)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    one = filip_loss({"text_to_image": found["text_to_image"]}, 5.0)
    expected = reference.maxsim_contrastive_loss(
        *wide, 5.0, text_mask=captions.mask, direction="text_to_image"
    )
    torch.testing.assert_close(one.double(), expected, rtol=1e-5, atol=1e-6)


def test_layouts_hold_the_same_captions_at_the_fill_asked_for():
    def inputs(layout):
        work = Workload(
            "maxsim_scores", "both", "forward", 3, 40, 50, 7, 8, "float32", layout, 0.55
        )
        return work, make_inputs(work, CPU)

    padded_work, padded = inputs("padded")
    packed_work, packed = inputs("packed")
    torch.testing.assert_close(padded.captions.tokens[padded.captions.mask], packed.captions.tokens)
    torch.testing.assert_close(padded.images, packed.images)
    assert int(padded.captions.lengths.min()) >= 1
    assert float(padded.captions.lengths.float().mean()) / 50 == pytest.approx(0.55, abs=0.02)
    assert packed.captions.tokens.requires_grad and packed.captions.tokens.is_leaf
    flop = useful_flop(packed_work, packed.captions)
    assert (
        flop
        == useful_flop(padded_work, padded.captions)
        == 2 * 3 * 7 * 8 * len(packed.captions.tokens)
    )
