"""The token ops: what is measured, on what, by whom, and against which truth."""

import pytest
import torch

from benchmarks import token_parity, token_workloads
from benchmarks.peers import Unavailable
from benchmarks.token_workloads import (
    CLUSTERS,
    COMPILED,
    CONTENDERS,
    FARTHEST,
    GRAM,
    SIMILARITY,
    TokenInputs,
    build,
    make_inputs,
    sweep,
    takes_part,
)
from fastgoal_kernels import reference
from fastgoal_kernels.backends import BackendError

CPU = torch.device("cpu")
WORKS = {work.op: work for work in sweep(cuda=False, quick=True)}
FEASIBLE = [
    pytest.param(name, work, id=f"{name}, {work.op}")
    for work in WORKS.values()
    for name in CONTENDERS
    if takes_part(name, work) and name not in ("fastgoal triton", COMPILED)
]


@pytest.mark.parametrize("name, work", FEASIBLE)
def test_contenders_are_right(name, work):
    inputs = make_inputs(work, CPU)
    errors = token_parity.measure(work, build(name, work, inputs), inputs)
    expected = {"choices"} if work.op == FARTHEST else {"output", "gradients"}
    assert set(errors) == expected
    limits = token_parity.limits(work, CPU)
    assert limits is token_parity.IEEE
    assert all(error <= limits[key] for key, error in errors.items()), errors


@pytest.mark.parametrize("op", [SIMILARITY, CLUSTERS])
def test_wrong_outputs_and_gradients_are_seen(op):
    work = WORKS[op]
    inputs = make_inputs(work, CPU)
    way = build("eager", work, inputs)
    for at, key in enumerate(["output", "gradients", "gradients"]):

        def wrong(given, at=at):
            results = list(way(given))
            results[at] = 1.1 * results[at]
            return tuple(results)

        assert token_parity.measure(work, wrong, inputs)[key] > token_parity.ROUNDED[key]


def test_boxes_and_spans_lie_inside_and_vary():
    work = WORKS[SIMILARITY]
    boxes, sizes, grid, spans = make_inputs(work, CPU).others
    assert grid == (3, 3) and sizes.shape == (4, 2)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= sizes).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all() and (spans[:, 1] > spans[:, 0]).all()
    assert (spans >= 0).all() and (spans <= work.count).all()
    assert len(boxes.unique(dim=0)) == 4


def test_a_choice_is_judged_by_those_before_it():
    # Of 0, 1, 5 and -6 on a line, from 0: -6 is farthest, then 5 (5 from 0), then 1.
    points = torch.tensor([0.0, 1.0, 5.0, -6.0])[None, :, None]
    best = reference.farthest_point_sampling(points, 4)
    assert best.tolist() == [[0, 3, 2, 1]]
    assert token_parity.shortfall(points, best[:, :3]) == 0
    second = torch.tensor([[0, 2, 3]])  # 25 of 36, and then the farthest
    assert token_parity.shortfall(points, second) == pytest.approx(1 - 25 / 36)
    assert token_parity.shortfall(points, torch.tensor([[0, 3, 3]])) == 1
    assert token_parity.shortfall(points, torch.tensor([[1, 3, 2]])) == float("inf")


def test_near_ties_may_go_either_way_and_near_duplicates_may_not():
    # Where a Gram matrix decides between points closer than its rounding, the others do not.
    points = torch.full((1, 3, 8), 1000.0)
    points[0, 1] += 1e-3
    points[0, 2] += 2e-3
    gram = token_workloads.gram_farthest_points(points, 2)
    exact = reference.farthest_point_sampling(points, 2)
    assert token_parity.shortfall(points, exact) == 0
    assert gram[0, 1] != 2 and token_parity.shortfall(points, gram) > 0.1
    tie = torch.tensor([0.0, 1.0, -1.0 - 1e-7])[None, :, None]
    for chosen in (1, 2):
        assert token_parity.shortfall(tie, torch.tensor([[0, chosen]])) < 1e-6


def test_ops_without_a_kernel_take_the_default_beside_those_that_have_one(monkeypatch):
    def only_spans(op, backend, *tensors):
        if op != "span_mean":
            raise BackendError(f"{op} has no Triton kernel yet")
        return "reference"

    seen = {}

    def similarity(backends):
        seen.update(backends)
        return lambda inputs: ()

    monkeypatch.setattr(token_workloads, "choose_backend", only_spans)
    monkeypatch.setattr(token_workloads, "_similarity", similarity)
    work = WORKS[SIMILARITY]
    build("fastgoal triton", work, make_inputs(work, CPU))
    assert seen == {"region_mean": None, "span_mean": "reference", "token_similarity_loss": None}
    with pytest.raises(Unavailable, match="no Triton kernel"):
        build("fastgoal triton", WORKS[CLUSTERS], make_inputs(WORKS[CLUSTERS], CPU))


def test_who_takes_part():
    names = {op: [n for n in CONTENDERS if takes_part(n, work)] for op, work in WORKS.items()}
    assert GRAM in names[FARTHEST] and COMPILED not in names[FARTHEST]
    assert COMPILED in names[CLUSTERS] and GRAM not in names[CLUSTERS]
    assert names[SIMILARITY] == ["fastgoal triton", "fastgoal torch", "eager"]


def test_the_sweep_of_a_gpu_is_at_the_promised_sizes():
    works = {work.op: work for work in sweep(cuda=True, quick=False)}
    sizes = {op: (w.images, w.tokens, w.count, w.dim, w.dtype) for op, w in works.items()}
    assert sizes == {
        FARTHEST: (256, 197, 65, 768, "bfloat16"),
        SIMILARITY: (256, 196, 248, 768, "bfloat16"),
        CLUSTERS: (256, 65, 32, 768, "bfloat16"),
    }
    assert works[FARTHEST].stage == "inference"
    assert works[FARTHEST].describe() == (
        "farthest_point_sampling, inference: 256 images, 197 points → 65, D 768, bfloat16"
    )
    assert works[SIMILARITY].describe().endswith("196 patches, 248 words, D 768, bfloat16")


def test_inputs_of_half_precision_keep_their_limits():
    work = next(work for work in sweep(cuda=True, quick=False) if work.op == SIMILARITY)
    work = type(work)(**{**work.as_json(), "images": 16, "dim": 64})
    inputs = make_inputs(work, CPU)
    assert isinstance(inputs, TokenInputs) and inputs.leaves[0].dtype == torch.bfloat16
    errors = token_parity.measure(work, build("fastgoal torch", work, inputs), inputs)
    limits = token_parity.limits(work, CPU)
    assert limits is token_parity.ROUNDED
    assert all(error <= limits[key] for key, error in errors.items()), errors


def test_spot_checks():
    checks = {check["name"]: check for check in token_parity.run_checks(CPU)}
    assert len(checks) == 6
    for op in WORKS:
        assert checks[f"torch {op}"]["status"] == "ok"
        assert checks[f"triton {op}"]["status"] in ("ok", "unavailable")
