"""Finding codes: inside their range, close to the weights, and GPTQ closer where inputs are correlated."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams

from pennyweight import formats, kinds
from pennyweight.formats import Grid, packed_int, trellis, zigzag
from pennyweight.model.stored import Stored
from pennyweight.quantize import _grids, gptq, rtn

QUANTISERS = [kinds.load("quantize", name) for name in kinds.names("quantize")]
every_quantiser = pytest.mark.parametrize("quantiser", QUANTISERS, ids=kinds.names("quantize"))
SIZES = [
    (1, 1, 1),
    (1, 63, 63),
    (63, 1, 1),
    (7, 63, 9),
    (5, 257, 257),
    (63, 384, 128),
    (3, 260, 20),
]  # rows, columns, group


@pytest.fixture(autouse=True)
def garbage_in_new_memory(monkeypatch):
    """torch.empty hands out NaN, or a code that is out of range: output that is never written cannot pass."""
    empty = torch.empty

    def filled(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 113)

    monkeypatch.setattr(torch, "empty", filled)


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Normal weights with a few outliers, as real matrices have."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator)
    return matrix * torch.where(torch.rand(rows, columns, generator=generator) < 0.01, 6.0, 1.0)


def inputs(columns: int, seed: int = 0, *, rank: int | None = None) -> torch.Tensor:
    """(tokens, columns), strongly correlated: few causes, unequal sizes, a little noise."""
    generator = torch.Generator().manual_seed(1000 + seed)
    causes = rank or max(1, columns // 4)
    mixed = torch.randn(4 * columns, causes, generator=generator) @ torch.randn(causes, columns, generator=generator)
    sizes = torch.randn(columns, generator=generator).exp()
    return (mixed + 0.1 * torch.randn(4 * columns, columns, generator=generator)) * sizes


def moment_of(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def quantised(quantiser, weight: torch.Tensor, moment: torch.Tensor | None, spec: Stored) -> torch.Tensor:
    codes, grid = quantiser.quantize(weight, quantiser.prepare(moment), spec)
    scale = grid.scale
    return packed_int.dequantize(codes, scale).float()


def output_error(weight: torch.Tensor, made: torch.Tensor, x: torch.Tensor) -> float:
    return float(((weight - made) @ x.T).square().sum())


def plain_scales(weight: torch.Tensor, spec: Stored) -> torch.Tensor:
    """compressed-tensors' own: the largest magnitude of a group spans the whole range."""
    grouped = weight.view(len(weight), -1, spec.group)
    arguments = QuantizationArgs(
        num_bits=spec.bits, type="int", strategy="group", group_size=spec.group, symmetric=True
    )
    return calculate_qparams(grouped.amin(-1), grouped.amax(-1), arguments)[0].bfloat16()


# ------------------------------------------------------------------------------------------------ every quantiser


@every_quantiser
@pytest.mark.parametrize("bits", packed_int.BITS)
@pytest.mark.parametrize(("rows", "columns", "group"), SIZES)
def test_codes_keep_to_their_range_and_stay_near_the_weights(quantiser, bits, rows, columns, group):
    weight, spec = weights(rows, columns), packed_int.Spec(bits, group)
    codes, grid = quantiser.quantize(weight, quantiser.prepare(moment_of(inputs(columns))), spec)
    scale = grid.scale
    low, high = packed_int.Spec(bits, 1).limits
    assert (codes.dtype, codes.shape, scale.dtype) == (torch.int8, weight.shape, torch.bfloat16)
    assert scale.shape == (rows, columns // group)
    assert low <= int(codes.min())
    assert int(codes.max()) <= high
    assert (scale > 0).all()
    assert codes.is_contiguous()
    error = (packed_int.dequantize(codes, scale).float() - weight).norm() / weight.norm()
    assert error < {4: 0.4, 8: 0.025}[bits]
    packed_int.pack(codes, Grid(scale), spec)  # ready to be stored


@every_quantiser
@pytest.mark.parametrize("bits", packed_int.BITS)
def test_weights_that_are_codes_times_scale_are_found_exactly(quantiser, bits):
    _, high = packed_int.Spec(bits, 1).limits
    codes = torch.randint(-high, high + 1, (63, 256), generator=torch.Generator().manual_seed(3)).float()
    codes[:, ::64] = {4: high, 8: high + 0.5}[bits]  # a range that is tried first, with a scale of one
    found, grid = quantiser.quantize(codes, quantiser.prepare(torch.eye(256)), packed_int.Spec(bits, 64))
    scale = grid.scale
    assert torch.equal(scale, torch.ones(63, 4).bfloat16())
    codes[:, ::64] = high
    assert torch.equal(found.float(), codes)


@every_quantiser
def test_zeros_stay_zero(quantiser):
    spec, x = packed_int.Spec(4, 21), inputs(63)
    weight = weights(7, 63)
    weight[3] = 0  # a row, and a whole group of another
    weight[5, 21:42] = 0
    made = quantised(quantiser, torch.zeros(7, 63), moment_of(x), spec)
    assert torch.equal(made, torch.zeros(7, 63))
    made = quantised(quantiser, weight, moment_of(x), spec)
    assert torch.isfinite(made).all()
    assert not made[3].any()


@every_quantiser
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_inputs_are_no_obstacle(quantiser, value):
    """All inputs zero: no column matters. All equal: only the sum over columns does."""
    weight, x = weights(5, 63), torch.full((257, 63), value)
    made = quantised(quantiser, weight, moment_of(x), packed_int.Spec(4, 63))
    assert torch.isfinite(made).all()
    assert (made - weight).norm() < 0.5 * weight.norm()


@every_quantiser
def test_inputs_that_are_always_zero_are_left_out_of_it(quantiser):
    x, weight, spec = inputs(63), weights(7, 63), packed_int.Spec(4, 9)
    dead = torch.arange(63) % 4 == 1
    x[:, dead] = 0
    codes, _ = quantiser.quantize(weight, quantiser.prepare(moment_of(x)), spec)
    nearest = _grids.codes(weight, _grids.grid(weight, spec, moment_of(x).diagonal()), spec)
    assert torch.equal(codes[:, dead], nearest[:, dead])
    other = torch.where(dead, 0.01, weight)  # what multiplies a zero cannot matter to the rest
    others = quantiser.quantize(other, quantiser.prepare(moment_of(x)), packed_int.Spec(4, 1))[0]
    same = quantiser.quantize(weight, quantiser.prepare(moment_of(x)), packed_int.Spec(4, 1))[0]
    assert torch.equal(others[:, ~dead], same[:, ~dead])


@every_quantiser
def test_a_moment_that_is_not_finite_is_refused(quantiser):
    for poison in (torch.nan, torch.inf):
        moment = moment_of(inputs(63))
        moment[7, 7] = poison
        with pytest.raises(
            RuntimeError, match="second moments are not finite: the calibration pass met NaN or overflow"
        ):
            quantiser.prepare(moment)


@every_quantiser
def test_neither_weights_nor_moments_are_changed(quantiser):
    weight, moment = weights(7, 63), moment_of(inputs(63))
    moment[:, 5] = moment[5, :] = 0
    before = weight.clone(), moment.clone()
    quantised(quantiser, weight, moment, packed_int.Spec(4, 9))
    assert torch.equal(weight, before[0])
    assert torch.equal(moment, before[1])


@every_quantiser
@pytest.mark.parametrize("group", [2, 64, 128])
def test_columns_must_be_a_multiple_of_the_group(quantiser, group):
    with pytest.raises(ValueError, match=f"63 columns are not a multiple of the group {group}"):
        quantised(quantiser, weights(5, 63), moment_of(inputs(63)), packed_int.Spec(4, group))


@every_quantiser
def test_bfloat16_weights_give_what_their_values_give(quantiser):
    weight, moment = weights(7, 63).bfloat16(), moment_of(inputs(63))
    assert torch.equal(
        quantised(quantiser, weight, moment, packed_int.Spec(4, 9)),
        quantised(quantiser, weight.float(), moment, packed_int.Spec(4, 9)),
    )


@every_quantiser
def test_large_matrices_are_worked_on_in_blocks_of_rows(quantiser, monkeypatch):
    weight, moment, spec = weights(63, 257), moment_of(inputs(257)), packed_int.Spec(4, 257)
    whole = quantised(quantiser, weight, moment, spec)
    for values in (1, 1000):
        monkeypatch.setattr(packed_int, "BLOCK_VALUES", values)
        assert torch.equal(quantised(quantiser, weight, moment, spec), whole)


# ----------------------------------------------------------------------------------------------------------- gptq


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("rows", "columns", "group"), [(1, 63, 21), (63, 257, 257), (32, 384, 128)])
def test_gptq_changes_the_outputs_less_than_rounding_does(seed, rows, columns, group):
    weight, x, spec = weights(rows, columns, seed), inputs(columns, seed), packed_int.Spec(4, group)
    errors = {
        quantiser.__name__: output_error(weight, quantised(quantiser, weight, moment_of(x), spec), x)
        for quantiser in (gptq, rtn)
    }
    assert errors[gptq.__name__] < 0.8 * errors[rtn.__name__]


def gptq_reference(weight: torch.Tensor, moment: torch.Tensor, scale: torch.Tensor, spec: Stored) -> torch.Tensor:
    """GPTQ as it is derived, in float64: quantise a column, spread its error by the inverse Hessian, strike the
    column out of the inverse, go on."""
    low, high = spec.limits
    hessian = moment.double().clone()
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True).tolist()
    diagonal[diagonal <= 0] = 1.0
    diagonal += 0.01 * diagonal.mean()
    inverse = torch.linalg.inv(hessian)
    work, codes = weight.double().clone(), torch.zeros(weight.shape)
    for j in order:
        step = scale[:, j // spec.group].double()
        codes[:, j] = (work[:, j] / step).round().clamp(low, high)
        error = (work[:, j] - codes[:, j] * step) / inverse[j, j]
        work -= error[:, None] * inverse[j]
        inverse = inverse - inverse[:, j : j + 1] * inverse[j : j + 1] / inverse[j, j]
    return codes


@pytest.mark.parametrize("bits", packed_int.BITS)
@pytest.mark.parametrize(("rows", "columns", "group"), [(7, 63, 9), (3, 257, 257), (5, 320, 64)])
def test_gptq_in_blocks_is_gptq_column_by_column(bits, rows, columns, group):
    weight, moment, spec = weights(rows, columns), moment_of(inputs(columns)), packed_int.Spec(bits, group)
    codes, _ = gptq.quantize(weight, gptq.prepare(moment), spec)
    scale = _grids.grid(weight, spec, moment.diagonal()).scale  # as they are while codes are found
    expected = gptq_reference(weight, moment, scale, spec)
    assert (codes == expected).float().mean() > 0.995  # float32 may round a tie the other way
    slow = expected * scale.float().repeat_interleave(group, dim=1)
    assert output_error(weight, packed_int.dequantize(codes, scale).float(), inputs(columns)) == pytest.approx(
        output_error(weight, slow.bfloat16().float(), inputs(columns)), rel=0.02
    )


def test_with_inputs_that_have_nothing_to_do_with_each_other_gptq_is_rounding():
    weight, spec = weights(63, 257), packed_int.Spec(4, 257)
    codes, grid = gptq.quantize(weight, gptq.prepare(torch.eye(257)), spec)
    expected, plain = rtn.quantize(weight, None, spec)
    assert torch.equal(codes, expected)
    fitted, before = ((codes * each.scale.float() - weight).square().sum(dim=1) for each in (grid, plain))
    assert (fitted <= before * (1 + 1e-6)).all()
    assert fitted.sum() < before.sum()


def test_gptq_visits_the_columns_with_the_largest_inputs_first():
    moment = torch.diag(torch.tensor([1.0, 63.0, 0.0, 257.0, 63.0]))
    prepared = gptq.prepare(moment)
    assert prepared.order.tolist() == [3, 1, 4, 0, 2]
    assert prepared.importance.tolist() == [1.0, 63.0, 0.0, 257.0, 63.0]


def test_gptq_without_moments_says_how_to_get_them():
    with pytest.raises(ValueError, match=r"GPTQ needs the second moments.*; run the calibration pass first"):
        gptq.prepare(None)


def test_rounding_needs_no_moments():
    assert rtn.prepare(None) is None
    made = quantised(rtn, weights(7, 63), None, packed_int.Spec(8, 63))
    assert (made - weights(7, 63)).norm() < 0.01 * weights(7, 63).norm()


# --------------------------------------------------------------------------------------------------------- scales


def weighted_errors(weight: torch.Tensor, scale: torch.Tensor, spec: Stored, importance: torch.Tensor) -> torch.Tensor:
    """(rows, groups) sums of importance * squared rounding error, in float64."""
    made = _grids.codes(weight, Grid(scale), spec).double() * scale.double().repeat_interleave(spec.group, dim=1)
    error = (made - weight.double()).square() * importance.double()
    return error.view(len(weight), -1, spec.group).sum(-1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("columns", "group"), [(63, 63), (257, 257), (256, 32), (5, 1)])
def test_chosen_scales_are_no_worse_than_the_plain_ones_in_weighted_error(seed, columns, group):
    weight, spec = weights(63, columns, seed), packed_int.Spec(4, group)
    importance = moment_of(inputs(columns, seed)).diagonal()
    chosen = weighted_errors(weight, _grids.grid(weight, spec, importance).scale, spec, importance)
    plain = weighted_errors(weight, plain_scales(weight, spec), spec, importance)
    assert (chosen <= plain * (1 + 1e-5)).all()
    if group > 1:
        assert chosen.sum() < 0.97 * plain.sum()


def test_importance_decides_what_is_clipped():
    """One outlier among 62 small weights: keeping it costs the others their precision."""
    weight = torch.full((1, 63), 0.3)
    weight[0, ::2] = -0.2
    weight[0, 7] = -4.0
    spec = packed_int.Spec(4, 63)
    outlier = torch.ones(63)
    outlier[7] = 1e6
    crowd = torch.ones(63)
    crowd[7] = 0.0
    keeping, clipping = (_grids.grid(weight, spec, importance).scale for importance in (outlier, crowd))
    assert clipping.item() < keeping.item()
    made = packed_int.dequantize(_grids.codes(weight, Grid(keeping), spec), keeping)
    assert abs(made[0, 7].item() + 4.0) < 0.1
    for importance, better, worse in ((outlier, keeping, clipping), (crowd, clipping, keeping)):
        errors = [weighted_errors(weight, scale, spec, importance).item() for scale in (better, worse)]
        assert errors[0] < errors[1]


def test_clipping_pays_on_weights_with_outliers():
    weight, spec = weights(63, 256), packed_int.Spec(4, 128)
    flat = torch.ones(256)
    chosen = weighted_errors(weight, _grids.grid(weight, spec).scale, spec, flat).sum()
    assert chosen < 0.9 * weighted_errors(weight, plain_scales(weight, spec), spec, flat).sum()


def test_eight_bits_keep_the_whole_range():
    weight = weights(7, 63)
    scale = _grids.grid(weight, packed_int.Spec(8, 63)).scale
    assert torch.equal(scale, (weight.abs().amax(1, keepdim=True) / 127.5).bfloat16())
    made = packed_int.dequantize(_grids.codes(weight, Grid(scale), packed_int.Spec(8, 63)), scale).float()
    assert ((made - weight).abs() <= 0.8 * scale.float() + 2**-8 * weight.abs()).all()


# ------------------------------------------------------------------------------------------- groups down the column


DOWN = [zigzag.Spec(64), zigzag.Spec(64, "affine"), zigzag.Spec(32, "super")]


def made_of(quantiser, weight: torch.Tensor, moment: torch.Tensor | None, spec: Stored) -> torch.Tensor:
    codes, grid = quantiser.quantize(weight, quantiser.prepare(moment), spec)
    parts = zigzag.pack((codes + 8 if grid.minimum is None else codes).to(torch.uint8), grid, spec)
    assert formats.stored_of(parts) == spec
    return formats.unpack(parts)


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@every_quantiser
@pytest.mark.parametrize("spec", DOWN, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 5), (63, 17), (300, 40), (700, 3)])
def test_groups_down_the_column_stay_near_the_weights(quantiser, spec, rows, columns):
    weight = gaussian(rows, columns)
    error = (made_of(quantiser, weight, moment_of(inputs(columns)), spec) - weight).norm() / weight.norm()
    assert error < (0.12 if quantiser is rtn else 0.25)


def test_super_scales_are_better_than_affine_ones_at_equal_bits_and_these_than_symmetric_ones():
    """Normal weights; relative errors, and the bits each format takes."""
    weight = gaussian(2048, 64)
    errors = [float((made_of(rtn, weight, None, spec) - weight).norm() / weight.norm()) for spec in DOWN]
    bits = [8 * (spec.nbytes(2048, 64) - 4 * 2048 - 40) / weight.numel() for spec in DOWN]
    assert bits == [4.25, 4.5, 4.5]
    symmetric, affine, super_ = errors
    assert super_ < 0.95 * affine
    assert affine < 0.95 * symmetric


def test_weights_that_are_all_positive_or_all_alike_are_kept():
    for weight in (1 + 0.1 * gaussian(256, 3).abs(), torch.full((256, 3), -0.7), torch.zeros(256, 3)):
        for spec in DOWN:
            made = made_of(rtn, weight, None, spec)
            assert torch.isfinite(made).all()
            assert (made - weight).norm() <= 0.08 * weight.norm(), spec


@pytest.mark.parametrize("spec", [packed_int.Spec(4, 32), trellis.Spec(2, 32), trellis.Spec(3, 32)], ids=str)
def test_scales_fitted_at_the_end_lower_the_error_of_the_same_codes(spec, monkeypatch):
    torch.manual_seed(0)
    weight, inputs = torch.randn(96, 128), torch.randn(2048, 128) @ torch.randn(128, 128)
    prepared = gptq.prepare(inputs.T @ inputs / len(inputs))
    codes, grid = gptq.quantize(weight, prepared, spec)
    monkeypatch.setattr(gptq, "_fitted", lambda weight, steps, grid, prepared, spec: grid.scale.float())
    before, plain = gptq.quantize(weight, prepared, spec)
    assert torch.equal(codes, before)

    def errors(grid):
        parts = {"codes": codes, "grid": grid}
        made = formats.unpack(formats.of(spec).encode(weight, spec, lambda w, s: tuple(parts.values()), None))
        return ((weight - made) @ inputs.T).square().mean(dim=1)

    fitted, kept = errors(grid), errors(plain)
    assert fitted.sum() < 0.97 * kept.sum()
    assert (fitted <= kept * 1.001).all()
    assert torch.equal(_grids.kept(grid.scale, spec).float(), grid.scale.float())
