"""The fit in sequence: blocks take back the error that came in, in closed form."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.heal import in_sequence
from pennyweight.live.walk import Walk
from pennyweight.model.slots import Slot
from pennyweight.runs.events import Silent
from pennyweight.runs.store import Store
from tests.conftest import FAMILIES
from tests.test_heal import LAYOUT
from tests.test_heterogeneous import build

NARROW = {Slot("ffn", 0): LAYOUT[Slot("ffn", 0)]}
DAMAGED = (Slot("ffn", 1), Slot("mixer", 2))


def ids(rows: int = 72, tokens: int = 32, seed: int = 3) -> torch.Tensor:
    return torch.randint(300, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def fit(parent: Path, child: Path, changed, run: Path) -> dict[str, torch.Tensor]:
    walks = (Walk(Checkpoint(folder)) for folder in (parent, child))
    return in_sequence.fit(*walks, changed, ids(), tokens=64 * 32, batch_rows=4, store=Store(run, {}), listen=Silent())


def with_tensors(folder: Path, out: Path, change) -> Path:
    """A copy of a model whose tensors `change` has edited in place."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "checksums.json").unlink(missing_ok=True)
    return out


def leaving(folder: Path) -> torch.Tensor:
    """What leaves the last layer, on rows that no fit has seen."""
    walk = Walk(Checkpoint(folder))
    with torch.no_grad():
        hidden = walk.embed(ids(rows=8, seed=9))
        for layer in walk.each():
            hidden = layer.run(hidden)
    return hidden


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_that_differ_from_the_parents_become_the_parents(pico, tmp_path, monkeypatch, family):
    """What is off is wholly theirs to take back, factors of the residual stream included; so the answer is known."""
    parent, walk = pico(family), Walk(Checkpoint(pico(family)))
    parts = {slot: walk.layer(slot.layer or 0).parts[slot] for slot in DAMAGED}
    names = {slot: own.place.tensor("down_proj" if slot.kind == "ffn" else "o_proj") for slot, own in parts.items()}
    draw = torch.Generator().manual_seed(5)

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        for name in names.values():
            noise = torch.randn(tensors[name].shape, generator=draw) * tensors[name].float().std()
            tensors[name] = (tensors[name].float() + 0.3 * noise).bfloat16()

    child = with_tensors(parent, tmp_path / "child", damage)
    monkeypatch.setattr(in_sequence, "DAMPING", 1e-9)
    found, wanted = fit(parent, child, DAMAGED, tmp_path / "run"), load_file(parent / "model.safetensors")
    if any(own.norm("post_norm") is not None for own in parts.values()):
        assert not found, "what is normed before it joins the stream is not linear in the matrix"
        return
    before = load_file(child / "model.safetensors")
    for name in names.values():
        off = (found[name].float() - wanted[name].float()).norm() / wanted[name].float().norm()
        assert off < 0.01 < 0.2 < (before[name].float() - wanted[name].float()).norm() / wanted[name].float().norm()


def test_what_channels_that_went_gave_is_taken_over_by_those_that_are_like_them(pico, tmp_path):
    """What leaves the last layer is nearer on text that was not fitted to."""

    def in_pairs(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("gate_proj", "up_proj"):
            weight = tensors[f"model.layers.1.mlp.{name}.weight"]
            weight[:64] = weight[64:]

    parent = with_tensors(pico("qwen3"), tmp_path / "parent", in_pairs)
    child = build(parent, tmp_path / "child", {Slot("ffn", 1): NARROW[Slot("ffn", 0)]})
    found = fit(parent, child, [Slot("ffn", 1)], tmp_path / "run")
    fitted = with_tensors(child, tmp_path / "fitted", lambda tensors: tensors.update(found))
    wanted = leaving(parent)
    before, after = ((leaving(folder) - wanted).square().mean() for folder in (child, fitted))
    assert after < 0.1 * before


def test_layers_before_the_first_that_changed_are_not_touched(pico, tmp_path):
    parent = pico("llama")
    child = build(parent, tmp_path / "child", {Slot("ffn", 2): NARROW[Slot("ffn", 0)]})
    assert {name.split(".")[2] for name in fit(parent, child, [Slot("ffn", 2)], tmp_path / "run")} == {"2"}


def test_a_matrix_that_does_no_better_on_rows_kept_apart_stays(pico, tmp_path, monkeypatch):
    parent = pico("qwen3")
    child = build(parent, tmp_path / "child", NARROW)
    draw = torch.Generator().manual_seed(0)
    monkeypatch.setattr(in_sequence, "solve", lambda cross, *_, **__: 10 * torch.randn(cross.shape, generator=draw))
    found, before = fit(parent, child, NARROW, tmp_path / "run"), load_file(child / "model.safetensors")
    assert found and all(torch.equal(tensor, before[name].bfloat16()) for name, tensor in found.items())
    first, last = Store(tmp_path / "run", {}).get("heal/fitted-loss/0.ffn")
    assert first == last > 0


def test_blocks_of_all_kinds_are_fitted_or_left_out(pico, tmp_path):
    """A linear block by its one matrix; a block that is gone has none."""
    parent = pico("qwen3")
    found = fit(parent, build(parent, tmp_path / "child", LAYOUT), LAYOUT, tmp_path / "run")
    assert "model.layers.1.self_attn.linear_attn.weight" in found
    assert not any(name.startswith("model.layers.2.mlp") for name in found)


def test_finished_matrices_are_not_fitted_again(pico, tmp_path, monkeypatch):
    parent = pico("qwen3")
    child = build(parent, tmp_path / "child", NARROW)
    first = fit(parent, child, NARROW, tmp_path / "run")
    monkeypatch.setattr(in_sequence, "solve", lambda *_, **__: pytest.fail("solved again"))
    again = fit(parent, child, NARROW, tmp_path / "run")
    assert {name: tensor.tolist() for name, tensor in first.items()} == {n: t.tolist() for n, t in again.items()}
