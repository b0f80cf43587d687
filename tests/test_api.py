"""The Python face: live models in, ordinary transformers objects out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import pennyweight as pw
from tests.test_job import QUICK


@pytest.fixture
def config():
    return QUICK.model_copy(update={"data": QUICK.data.model_copy(update={"text": str(Path(__file__).parent)})})


def test_fit_is_the_function_even_after_the_job_was_used(pico, config, tmp_path):
    result = pw.fit(pico("llama"), pw.Budget(weights="40%"), out=tmp_path / "out", config=config)
    assert isinstance(result.model, PreTrainedModel)
    assert result.folder == tmp_path / "out"
    assert callable(pw.fit)
    model, tokenizer = pw.load(tmp_path / "out")
    ids = tokenizer("import os", return_tensors="pt")["input_ids"]
    assert torch.equal(model(ids).logits, result.model(ids).logits)


def test_a_live_model_goes_in_and_its_run_is_found_again(pico, config, tmp_path):
    live = AutoModelForCausalLM.from_pretrained(pico("qwen2"))
    tokenizer = AutoTokenizer.from_pretrained(pico("qwen2"))
    budget = pw.Budget(weights="40%")
    first = pw.fit(live, budget, out=tmp_path / "out", config=config, tokenizer=tokenizer)
    again = pw.fit(live, budget, out=tmp_path / "out", config=config, tokenizer=tokenizer)
    assert again.report["chosen"] == first.report["chosen"]
    with pytest.raises(ValueError, match="needs its tokenizer"):
        pw.fit(live, budget, out=tmp_path / "other", config=config)


def test_plan_reads_no_weights(pico, tmp_path):
    import shutil

    config_only = tmp_path / "config.json"
    shutil.copy(pico("qwen3") / "config.json", config_only)
    plan = pw.plan(config_only, pw.Budget(memory="1GiB"), workload=pw.Workload(prompt=8, new=8), machine="h100")
    assert plan.verdict == "fits as it is"
    assert plan.parameters > 0


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'fits'"):
        pw.fits  # noqa: B018
