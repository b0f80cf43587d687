"""Packed integers: what goes in comes out, as compressed-tensors packs and unpacks it, at every odd size."""

from __future__ import annotations

import re

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as library_dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight import formats
from pennyweight.formats import Grid, packed_int
from pennyweight.formats.packed_int import Spec

STORY = settings(deadline=None, derandomize=True, max_examples=60)


@st.composite
def matrices(draw) -> tuple[torch.Tensor, torch.Tensor, Spec]:
    """Random codes, scales and spec, of odd sizes and wide enough to tell 4 bits from 8."""
    bits = draw(st.sampled_from(packed_int.BITS))
    rows = draw(st.sampled_from([1, 2, 7, 63]))
    columns = draw(st.sampled_from([5, 7, 8, 63, 64, 257, 264]))
    group = draw(st.sampled_from([n for n in range(1, columns + 1) if columns % n == 0]))
    return random_matrix(rows, columns, Spec(bits, group), seed=draw(st.integers(0, 2**31)))


def random_matrix(rows: int, columns: int, spec: Spec, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Spec]:
    generator = torch.Generator().manual_seed(seed)
    low, high = spec.limits
    codes = torch.randint(low, high + 1, (rows, columns), generator=generator).to(torch.int8)
    codes.view(-1)[0], codes.view(-1)[-1] = low, high
    scale = torch.randn(rows, columns // spec.group, generator=generator).exp().bfloat16()
    return codes, scale, spec


def by_hand(codes: torch.Tensor, scale: torch.Tensor, spec: Spec) -> torch.Tensor:
    """code * scale, element by element, rounded to bfloat16 once."""
    return (codes.double() * scale.double().repeat_interleave(spec.group, dim=1)).bfloat16()


@STORY
@given(matrices())
def test_what_is_packed_unpacks_to_code_times_scale(matrix):
    codes, scale, spec = matrix
    parts = packed_int.pack(codes, Grid(scale), spec)
    assert {name: part.dtype for name, part in parts.items()} == {
        "weight_packed": torch.int32,
        "weight_scale": torch.bfloat16,
        "weight_shape": torch.int64,
    }
    assert parts["weight_shape"].tolist() == list(codes.shape)
    out = packed_int.unpack(parts)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, by_hand(codes, scale, spec))


@STORY
@given(matrices())
def test_the_words_are_those_of_compressed_tensors(matrix):
    codes, scale, spec = matrix
    packed = packed_int.pack(codes, Grid(scale), spec)["weight_packed"]
    assert torch.equal(packed, pack_to_int32(codes, spec.bits))
    assert torch.equal(unpack_from_int32(packed, spec.bits, codes.shape), codes)


@STORY
@given(matrices())
def test_the_values_are_those_of_compressed_tensors(matrix):
    codes, scale, spec = matrix
    arguments = QuantizationArgs(
        num_bits=spec.bits, type="int", strategy="group", group_size=spec.group, symmetric=True
    )
    theirs = library_dequantize(codes, scale, torch.zeros_like(scale, dtype=torch.int8), args=arguments)
    assert torch.equal(packed_int.unpack(packed_int.pack(codes, Grid(scale), spec)), theirs.bfloat16())


@STORY
@given(matrices())
def test_bytes_are_counted_to_the_byte_and_the_spec_is_read_off_the_shapes(matrix):
    codes, scale, spec = matrix
    parts = packed_int.pack(codes, Grid(scale), spec)
    assert spec.nbytes(*codes.shape) == sum(part.numel() * part.element_size() for part in parts.values())
    assert packed_int.spec_of(parts) == spec


@STORY
@given(matrices(), st.integers(1, 63))
def test_slicing_rows_is_slicing_the_matrix(matrix, rows):
    codes, scale, spec = matrix
    rows = min(rows, len(codes))
    parts = packed_int.pack(codes, Grid(scale), spec)
    sliced = packed_int.slice_rows(parts, rows)
    assert torch.equal(packed_int.unpack(sliced), packed_int.unpack(parts)[:rows])
    assert packed_int.spec_of(sliced) == spec
    assert parts["weight_shape"].tolist() == list(codes.shape), "the whole is left as it was"


@pytest.mark.parametrize("bits", packed_int.BITS)
def test_every_code_at_every_place_of_a_word(bits):
    low, high = packed_int.Spec(bits, 1).limits
    codes = torch.arange(low, high + 1).repeat(9)[None, :].to(torch.int8)  # every code meets every lane
    codes = torch.cat([codes.roll(shift, dims=1) for shift in range(8)])
    spec = Spec(bits, codes.shape[1])
    assert (low, high) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert torch.equal(packed_int.unpack(packed_int.pack(codes, Grid(torch.ones(8, 1)), spec)), codes.bfloat16())


def test_large_matrices_are_worked_on_in_blocks_of_rows(monkeypatch):
    codes, scale, spec = random_matrix(63, 257, Spec(4, 257))
    whole = packed_int.unpack(packed_int.pack(codes, Grid(scale), spec))
    for values in (1, 257, 1000, 62 * 257):
        monkeypatch.setattr(packed_int, "BLOCK_VALUES", values)
        assert torch.equal(packed_int.unpack(packed_int.pack(codes, Grid(scale), spec)), whole)
        assert torch.equal(packed_int.dequantize(codes, scale), whole)


def test_scales_are_kept_in_bfloat16():
    codes, scale, spec = random_matrix(2, 63, Spec(8, 9))
    exact = scale.float() * 1.001
    assert torch.equal(packed_int.pack(codes, Grid(exact), spec)["weight_scale"], exact.bfloat16())


def test_float16_scales_of_others_stay_float16():
    """Rounded to bfloat16 they would lose three bits."""
    codes, scale, spec = random_matrix(5, 63, Spec(4, 9))
    fine = (scale.float() * 1.0007).half()
    parts = packed_int.pack(codes, Grid(scale), spec) | {"weight_scale": fine}
    theirs = library_dequantize(
        codes,
        fine,
        torch.zeros_like(fine, dtype=torch.int8),
        args=QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=9, symmetric=True),
    )
    assert torch.equal(packed_int.unpack(parts), theirs.half())
    with pytest.raises(ValueError, match=r"stored as torch\.float32"):
        packed_int.unpack(parts | {"weight_scale": fine.float()})


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("part", ["zero_point", "g_idx"])
def test_parts_that_we_do_not_read_are_refused_by_name(part):
    """Weights without them would be others, and nobody would notice."""
    codes, scale, spec = random_matrix(5, 64, Spec(4, 32))
    tensors = {f"w.{name}": tensor for name, tensor in packed_int.pack(codes, Grid(scale), spec).items()}
    assert formats.read("w.weight", tensors, tensors.__getitem__)
    with pytest.raises(ValueError, match=f"w.weight_{part}"):
        formats.read("w.weight", {**tensors, f"w.weight_{part}": scale}, tensors.__getitem__)


@pytest.mark.parametrize(("bits", "code"), [(4, 8), (4, -9), (8, 128), (8, -129)])
def test_a_code_out_of_range_is_refused_with_the_range(bits, code):
    codes = torch.zeros(3, 63, dtype=torch.int32)
    codes[2, 62] = code
    low, high = packed_int.Spec(bits, 1).limits
    with pytest.raises(ValueError) as err:
        packed_int.pack(codes, Grid(torch.ones(3, 7)), Spec(bits, 9))
    assert str(err.value) == f"codes span {min(code, 0)}..{max(code, 0)}; {bits} bits hold {low}..{high}"


@pytest.mark.parametrize(
    ("rows", "columns", "scales", "group"),
    [
        (3, 63, (3, 7), 8),  # columns are no multiple of the group
        (3, 63, (3, 9), 9),  # a scale too many in each row
        (3, 63, (2, 7), 9),  # a row of scales missing
        (3, 63, (7, 3), 9),  # transposed
        (3, 63, (7,), 9),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_both(rows, columns, scales, group):
    with pytest.raises(ValueError) as err:
        packed_int.pack(torch.zeros(rows, columns, dtype=torch.int8), Grid(torch.ones(scales)), Spec(4, group))
    assert str(err.value) == f"codes {(rows, columns)} and scale {scales} do not fit group {group}"


@pytest.mark.parametrize("spec", [Spec(3, 9), Spec(16, 9), Spec(16, 0), Spec(4, 0)])
def test_bits_and_groups_that_cannot_be_packed_are_refused(spec):
    with pytest.raises(ValueError, match=re.escape("bits must be one of (4, 8), the group at least 1")):
        packed_int.pack(torch.zeros(3, 63, dtype=torch.int8), Grid(torch.ones(3, 7)), spec)


def test_parts_that_do_not_belong_together_are_refused_with_their_shapes():
    codes, scale, spec = random_matrix(5, 63, Spec(4, 9))
    parts = packed_int.pack(codes, Grid(scale), spec)
    wrong = {
        "too many columns": {"weight_shape": torch.tensor([5, 65])},
        "a row missing": {"weight_packed": parts["weight_packed"][:4]},
        "one row of scales for all": {"weight_scale": parts["weight_scale"][:1]},
        "scales that do not divide the row": {"weight_scale": parts["weight_scale"][:, :5]},
        "no scales": {"weight_scale": parts["weight_scale"][:, :0]},
    }
    for change in wrong.values():
        with pytest.raises(ValueError, match=r"weight_packed.*is no packed matrix of \d+ x \d+ in \(4, 8\) bits"):
            packed_int.unpack(parts | change)


@pytest.mark.parametrize("bits", packed_int.BITS)
@pytest.mark.parametrize("columns", [1, 4])
def test_a_matrix_too_narrow_to_tell_its_bits_is_refused_rather_than_guessed(bits, columns):
    codes, scale, spec = random_matrix(3, columns, Spec(bits, columns))
    parts = packed_int.pack(codes, Grid(scale), spec)
    with pytest.raises(ValueError, match="is no packed matrix of 3 x"):
        packed_int.unpack(parts)


def test_the_declared_scheme_is_one_that_compressed_tensors_reads():
    group = packed_int.config_group(Spec(4, 64), ["model.layers.0.mlp.up_proj"])
    arguments = QuantizationArgs(**group["weights"])
    assert (arguments.num_bits, arguments.group_size, arguments.symmetric) == (4, 64, True)
    assert group["targets"] == ["model.layers.0.mlp.up_proj"]
    row = QuantizationArgs(**packed_int.config_group(Spec(4, 172), [])["weights"])
    assert (row.strategy, row.group_size) == ("channel", None)
