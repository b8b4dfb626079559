"""The command that measures the MaxSim backward's ways, as far as it goes without a GPU."""

import json

import pytest
import torch

from benchmarks import maxsim_backward


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would measure")
def test_without_a_cuda_device_it_says_so(capsys):
    assert maxsim_backward.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().out


def test_a_dry_run_goes_through_every_workload(tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert maxsim_backward.main(["--dry-run", "--out", str(path)]) == 0, capsys.readouterr().out
    document = json.loads(path.read_text())
    rows = document["rows"]
    assert document["finished"]
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["side"] for row in rows} == {"images", "texts"}
    assert {row["direction"] for row in rows} == {"text_to_image", "both"}
    assert all(row["parity"] <= 1e-5 and row["median_ms"] > 0 for row in rows)
    live = {row["pairs"]: row["live"] for row in rows}
    assert set(live) == {"all", "skewed", "filtered random", "filtered trained"}
    assert live["all"] == live["skewed"] == 1.0
