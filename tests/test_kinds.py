"""The folder is the registry: what lies in a room is found, loads, and keeps the room's contract."""

from __future__ import annotations

import dataclasses
import importlib
import inspect

import numpy as np
import pytest
import torch

from pennyweight import families, formats, kinds, variants
from pennyweight.formats import packed_int
from pennyweight.judge import stats
from pennyweight.model.shapes import Shape
from pennyweight.model.slots import Slot
from pennyweight.model.stored import Stored
from pennyweight.quantize import rtn
from tests.gpt_oss import PARENT

ROOMS = ("families", "formats", "quantize", "search", "variants")

SIZES = {"U8": 1, "BF16": 2, "I32": 4, "F32": 4, "I64": 8}


def things(*rooms: str) -> list[tuple[str, str]]:
    return [(room, name) for room in rooms for name in kinds.names(room)]


def parameters_of(function) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_is_empty_and_its_things_are_sorted(room):
    names = kinds.names(room)
    assert names
    assert list(names) == sorted(names)


@pytest.mark.parametrize(("room", "name"), things(*ROOMS))
def test_every_file_of_a_room_loads_under_its_name_and_says_what_it_is(room, name):
    module = kinds.load(room, name)
    assert module.__name__ == f"pennyweight.{room}.{name}"
    assert module.__doc__
    assert module.__doc__.strip()


def test_a_new_file_is_found_and_helpers_are_not(tmp_path, monkeypatch):
    room = tmp_path / "a_room_made_for_this_test"
    room.mkdir()
    for file in ("zebra.py", "ant.py", "_helper.py", "__init__.py", "notes.txt"):
        (room / file).touch()
    monkeypatch.setattr(kinds, "_ROOT", tmp_path)
    assert kinds.names(room.name) == ("ant", "zebra")


@pytest.mark.parametrize("room", ROOMS)
def test_an_unknown_name_is_answered_with_what_there_is(room):
    with pytest.raises(ValueError) as err:
        kinds.load(room, "simplex")
    assert str(err.value) == f"there is no {room} called 'simplex'; there are: {', '.join(kinds.names(room))}"


def test_helpers_cannot_be_asked_for():
    with pytest.raises(ValueError, match="there is no families called '_decoder'"):
        kinds.load("families", "_decoder")


@pytest.mark.parametrize("name", kinds.names("families"))
def test_a_family_names_its_models_reads_slots_and_points_at_live_modules(name):
    family = kinds.load("families", name)
    assert family.MODEL_TYPES
    assert all(families.of(model_type) is family for model_type in family.MODEL_TYPES)
    assert parameters_of(family.mixer) == parameters_of(family.ffn) == ["config", "layer"]
    shapes = families.shapes({**PARENT, "model_type": family.MODEL_TYPES[0], "use_sliding_window": True})
    assert [str(slot) for slot in shapes][:3] == ["embed", "0.mixer", "0.ffn"]
    assert [str(slot) for slot in shapes][-2:] == ["norm", "head"]
    assert all(isinstance(slot, Slot) and isinstance(shape, Shape) for slot, shape in shapes.items())
    if family.MODULE is not None:  # None: planned from its config, not built
        modeling = importlib.import_module(family.MODULE)
        for suffix in ("DecoderLayer", "RMSNorm", "RotaryEmbedding", "ForCausalLM"):
            assert hasattr(modeling, family.PREFIX + suffix)


def test_no_two_families_claim_a_model_type():
    claimed = [kind for _, name in things("families") for kind in kinds.load("families", name).MODEL_TYPES]
    assert len(claimed) == len(set(claimed))


def test_an_unknown_model_type_is_answered_with_all_that_are_supported():
    with pytest.raises(ValueError) as err:
        families.of("mamba")
    supported = sorted(kind for _, name in things("families") for kind in kinds.load("families", name).MODEL_TYPES)
    assert f"model_type 'mamba' is not supported; supported are: {', '.join(supported)}." in str(err.value)
    assert "docs/adding.md" in str(err.value)


@pytest.mark.parametrize("name", kinds.names("variants"))
def test_a_variant_has_a_frozen_spec_and_four_ways_to_use_it(name):
    variant = kinds.load("variants", name)
    assert dataclasses.is_dataclass(variant.Spec)
    assert variant.Spec.__dataclass_params__.frozen
    assert "__str__" in vars(variant.Spec), "specs are shown to people: each words itself"
    assert parameters_of(variant.options) == ["shape"]
    assert parameters_of(variant.reshape) == ["shape", "spec"]
    assert parameters_of(variant.apply) == ["parts", "spec", "stats"]
    assert set(variant.STATS) <= set(stats.NAMES)


def test_every_variant_has_its_place_in_the_order_of_application():
    assert sorted(variants.order()) == list(kinds.names("variants"))
    places = [kinds.load("variants", axis).PLACE for axis in variants.order()]
    assert places == sorted(set(places))


@pytest.mark.parametrize("name", kinds.names("quantize"))
def test_a_quantiser_prepares_once_and_quantises_with_that(name):
    quantiser = kinds.load("quantize", name)
    assert parameters_of(quantiser.prepare) == ["moment"]
    spec = packed_int.Spec(4, 9)
    codes, grid = quantiser.quantize(torch.ones(1, 63), quantiser.prepare(torch.eye(63)), spec)
    assert (codes.dtype, codes.shape) == (torch.int8, (1, 63))
    assert (grid.scale.dtype, grid.scale.shape) == (torch.bfloat16, (1, 7))


def kept(name: str) -> list[Stored]:
    """Ways to keep a matrix that a format has."""
    module = kinds.load("formats", name)
    return [module.Spec(bits, 32) for bits in getattr(module, "BITS", ())] or [module.Spec()]


@pytest.mark.parametrize("stored", [spec for name in kinds.names("formats") for spec in kept(name)], ids=str)
def test_a_format_keeps_a_matrix_as_it_says(stored):
    module = formats.of(stored)
    assert stored.format == module.__name__.rpartition(".")[2]
    weight = torch.randn(300, 96, generator=torch.Generator().manual_seed(0))
    parts = module.encode(weight, stored, lambda w, spec: rtn.quantize(w, None, spec), torch.ones(96))
    assert module.MARK in parts
    assert set(parts) <= set(module.PARTS)
    said = {name: (tuple(part.shape), part.element_size()) for name, part in parts.items()}
    assert said == {name: (shape, SIZES[dtype]) for name, (dtype, shape) in stored.tensors(300, 96).items()}
    assert sum(part.numel() * part.element_size() for part in parts.values()) == stored.nbytes(300, 96)
    tensors = {formats.on_disk("x.weight", suffix): part for suffix, part in parts.items()}
    assert formats.found("x.weight", tensors) is module is formats.of_parts(parts)
    assert formats.stored_of(formats.read("x.weight", tensors, tensors.__getitem__)) == stored
    matrix = formats.unpack(parts)
    assert module.shape_of(parts) == matrix.shape == (300, 96)
    assert (matrix - weight).norm() < 0.5 ** (min(stored.bits, 8) - 1) * weight.norm()
    assert torch.equal(formats.unpack(module.slice_rows(parts, 257)), matrix[:257])
    assert torch.equal(formats.unpack(module.slice_columns(parts, 64)), matrix[:, :64])
    if module.CONFIG_FORMAT is not None:
        assert module.config_group(stored, ["x"])["targets"] == ["x"]


@pytest.mark.parametrize("stored", [spec for name in kinds.names("formats") for spec in kept(name)], ids=str)
def test_the_engine_refuses_what_no_norm_survives(stored):
    pytest.importorskip("pennyweight._native", reason="the native module was not built: no C++ compiler")
    parts = formats.of(stored).random(300, 96, stored, torch.Generator().manual_seed(0), 2**12)
    wide = [suffix for suffix, part in parts.items() if part.dtype in (torch.bfloat16, torch.float32)]
    assert wide or stored.down
    for suffix in wide:
        for value in (3e35, -3e35, float("nan"), float("inf")):
            damaged = parts[suffix].clone()
            damaged.view(-1)[-1] = value
            with pytest.raises(ValueError, match="the checkpoint is damaged"):
                formats.native("x", {**parts, suffix: damaged})


@pytest.mark.parametrize("stored", [spec for name in kinds.names("formats") for spec in kept(name)], ids=str)
def test_the_engine_multiplies_by_what_a_format_keeps(stored):
    native = pytest.importorskip("pennyweight._native", reason="the native module was not built: no C++ compiler")
    module = formats.of(stored)
    parts = module.random(300, 96, stored, torch.Generator().manual_seed(0), 2**12)
    linear = native.Linear()
    linear.add(formats.native("x", parts))
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(1)).numpy()
    y = np.empty((2, 300), np.float32)
    native.Product(linear, 1).run(x, y)
    expected = x @ formats.unpack(parts).float().numpy().T
    assert np.linalg.norm(y - expected) < 0.02 * np.linalg.norm(expected)  # activations go to 8 bits


@pytest.mark.parametrize("name", kinds.names("search"))
def test_a_search_solves_with_a_seed_and_a_time_limit(name):
    parameters = inspect.signature(kinds.load("search", name).solve).parameters
    assert parameters["seed"].default == 0
    assert parameters["time_limit_s"].default == 60.0
    needed = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
    assert needed == ["problem"], "fit calls every search alike"
