"""What a person typed, as a model."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from fastgoal_models import FastGoalModel
from fastgoal_models.errors import ConfigError
from fastgoal_models.glit import GlitRecord, LocalPair
from fastgoal_models.options import create_model, records_digest


def test_a_hub_that_can_not_be_reached_is_one_line(monkeypatch, caplog):
    """open_clip and the hub log each try, twice, before they give up."""

    def no_network(*arguments, **options):
        for _ in range(5):
            logging.getLogger("huggingface_hub.utils._http").warning("Retrying")
            logging.error("Failed to download weights")  # as open_clip does, at the root
        raise RuntimeError("Failed to download weights for tag 'openai': no network.")

    monkeypatch.setattr(FastGoalModel, "create", no_network)
    with pytest.raises(ConfigError, match=r"no network\. Fix: --pretrained FILE") as error:
        create_model("ViT-B-16", "openai", 0)
    assert isinstance(error.value.__cause__, RuntimeError) and caplog.records == []
    logging.error("another one")
    assert len(caplog.records) == 1


def test_other_errors_have_no_such_advice(monkeypatch):
    with pytest.raises(ConfigError, match="can not build model 'ViT-B-16'") as error:
        create_model("ViT-B-16", "no such tag", 0)
    assert "Fix: --pretrained FILE" not in str(error.value)


def test_the_digest_of_records_knows_all_that_a_run_reads_of_them():
    pair = LocalPair(0, (0.0, 0.0, 4.0, 4.0), "all", 0.5)
    record = GlitRecord("1", Path("a/1.jpg"), 8, 6, "A cat.", ("A cat.",), (pair,))
    others = [
        replace(record, id="2"),
        replace(record, image=Path("a/2.jpg")),
        replace(record, width=9),
        replace(record, height=7),
        replace(record, caption="A dog.", sentences=("A dog.",)),
        replace(record, captions=("A cat.", "A pet.")),
        replace(record, pairs=()),
    ]
    assert len({records_digest([one]) for one in [record, *others]}) == 8
    moved = replace(record, image=Path("/b/c/1.jpg"))
    assert records_digest([moved]) == records_digest([record])
