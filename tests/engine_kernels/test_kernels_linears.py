"""Linears against torch, on every instruction set: values, and that a row's bits are its own affair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millicent.engine.kernels.weights import (
    GROUP,
    Epilogue,
    Format,
    Matrix,
    PackedWeight,
    Quantized,
    concatenate,
    interleaved_rows,
    quantize,
)
from support import kernel_reference as reference

# Eight bits of an activation are half a step of 1/127 of its group's greatest: about 0.5% of a normal row.
TOLERANCE = {Format.F32: 2e-6, Format.BF16: 6e-3, Format.Q8: 1.2e-2, Format.Q4: 1.2e-2, Format.Q4_MIN: 1.2e-2}
PER_SHAPE = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def matrix_of(format_: Format, outputs: int, inputs: int) -> tuple[Matrix, torch.Tensor]:
    """A random matrix in that format, and its values in float32."""
    weight = torch.randn(outputs, inputs)
    if format_ is Format.F32:
        return weight, weight
    if format_ is Format.BF16:
        return weight.bfloat16(), weight.bfloat16().float()
    if format_ is Format.Q4_MIN:
        groups = inputs // GROUP
        values = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
        made = Quantized(format_, values, torch.rand(outputs, groups).half(), torch.randn(outputs, groups).half())
        return made, made.dequantized()
    quantized = quantize(weight, format_)
    return quantized, quantized.dequantized()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


@PER_SHAPE
@given(
    format_=st.sampled_from(Format),
    rows=st.integers(1, 20),
    outputs=st.integers(1, 200),
    groups=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_a_linear_is_torchs_for_any_shape_and_its_rows_do_not_depend_on_the_batch(
    instruction_set: str, format_: Format, rows: int, outputs: int, groups: int, seed: int
) -> None:
    torch.manual_seed(seed)
    matrix, values = matrix_of(format_, outputs, groups * GROUP)
    packed = PackedWeight(matrix)
    x = torch.randn(rows, groups * GROUP)
    found = packed(x)
    # An output can come near zero by cancellation, so errors are measured against what was added up.
    scale = x.norm(dim=1, keepdim=True) * values.norm(dim=1)
    assert ((found - reference.linear(x, values)).abs() / scale).max() < TOLERANCE[format_] * 2
    alone = torch.cat([packed(row[None].contiguous()) for row in x])
    assert torch.equal(found, alone)


@pytest.mark.parametrize("format_", list(Format))
def test_many_rows_give_the_bits_of_few(instruction_set: str, format_: Format) -> None:
    torch.manual_seed(3)
    packed = PackedWeight(matrix_of(format_, 100, 64)[0])
    x = torch.randn(131, 64)
    found = packed(x)
    for first, count in ((0, 1), (5, 2), (40, 17), (100, 31)):
        assert torch.equal(found[first : first + count], packed(x[first : first + count].contiguous()))


@pytest.mark.parametrize("format_", list(Format))
def test_unpacking_gives_back_exactly_what_was_packed(instruction_set: str, format_: Format) -> None:
    torch.manual_seed(4)
    matrix, values = matrix_of(format_, 130, 96)
    rows = torch.tensor([129, 0, 64, 63, 64])
    assert torch.equal(PackedWeight(matrix).unpack_rows(rows), values[rows])


@pytest.mark.parametrize("format_", list(Format))
def test_norm_bias_and_addition_come_along_with_a_linear(instruction_set: str, format_: Format) -> None:
    torch.manual_seed(5)
    matrix, values = matrix_of(format_, 70, 64)
    bias, norm, x, before = torch.randn(70), torch.randn(64), torch.randn(9, 64) * 3, torch.randn(9, 70)
    out = before.clone()
    PackedWeight(matrix, bias)(x, norm=norm, norm_epsilon=1e-5, epilogue=Epilogue.ADD, out=out)
    expected = before + reference.linear(x, values, norm, 1e-5) + bias
    assert relative_error(out, expected) < TOLERANCE[format_]


@pytest.mark.parametrize("format_", list(Format))
def test_gate_and_up_are_multiplied_in_one_go(instruction_set: str, format_: Format) -> None:
    torch.manual_seed(6)
    matrix, values = matrix_of(format_, 96, 64)
    order = interleaved_rows(48)
    interleaved = matrix[order] if isinstance(matrix, torch.Tensor) else matrix.rows(order)
    x = torch.randn(5, 64)
    found = PackedWeight(interleaved)(x, epilogue=Epilogue.SILU_MUL)
    assert relative_error(found, reference.gate_up(x, values[:48], values[48:])) < 2 * TOLERANCE[format_]


@pytest.mark.parametrize("format_", list(Format))
@pytest.mark.parametrize("magnitude", [0.0, 1e-38, 1e-20, 1e4, 1e18])
def test_extreme_activations_stay_finite_and_right(instruction_set: str, format_: Format, magnitude: float) -> None:
    torch.manual_seed(7)
    matrix, values = matrix_of(format_, 40, 64)
    x = torch.randn(3, 64) * magnitude
    found, expected = PackedWeight(matrix)(x), reference.linear(x, values)
    assert found.isfinite().all()
    if magnitude in {0.0, 1e-38}:
        assert found.abs().max() <= 1e-30
    else:
        assert relative_error(found, expected) < TOLERANCE[format_]


@pytest.mark.parametrize("format_", [Format.Q8, Format.Q4, Format.Q4_MIN])
def test_an_outlier_costs_its_own_group_alone(instruction_set: str, format_: Format) -> None:
    torch.manual_seed(8)
    matrix, values = matrix_of(format_, 40, 128)
    x = torch.randn(2, 128)
    x[:, 5] = 1000.0
    values[:, :32] = 0.0
    assert isinstance(matrix, Quantized)
    blank = Quantized(format_, matrix.values.clone(), matrix.scales.clone(), matrix.mins)
    blank.scales[:, 0] = 0.0
    if blank.mins is not None:
        blank.mins[:, 0] = 0.0
    assert relative_error(PackedWeight(blank)(x), reference.linear(x, values)) < TOLERANCE[format_]


@pytest.mark.parametrize("format_", [Format.Q8, Format.Q4])
def test_the_largest_sums_of_integers_do_not_wrap(instruction_set: str, format_: Format) -> None:
    """All weights and activations at their extremes: 16-bit intermediate sums would overflow here."""
    low = Quantized(format_, torch.zeros(64, 32, dtype=torch.uint8), torch.ones(64, 1, dtype=torch.float16))
    offset = 128 if format_ is Format.Q8 else 8
    for sign in (1.0, -1.0):
        x = torch.full((1, 32), sign)
        assert torch.allclose(PackedWeight(low)(x), torch.full((1, 64), -sign * offset * 32), rtol=1e-5)


def test_rounding_to_four_bits_beats_ggufs_and_eight_bits_are_half_a_step_off() -> None:
    torch.manual_seed(9)
    weight = torch.randn(64, 256)
    groups = weight.view(64, -1, GROUP)
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = (extreme / -8).half().float()
    plain = ((groups / scale).round().clamp(-8, 7) * scale).view(weight.shape)
    assert relative_error(quantize(weight, Format.Q4).dequantized(), weight) < relative_error(plain, weight)
    error = (quantize(weight, Format.Q8).dequantized() - weight).abs().view(64, -1, GROUP)
    assert (error <= groups.abs().amax(-1, keepdim=True) / 127 * 0.51 + 1e-6).all()


def test_matrices_of_different_formats_do_not_join() -> None:
    weight = torch.randn(32, 32)
    assert concatenate([quantize(weight, Format.Q4), quantize(weight, Format.Q8)]) is None
    assert concatenate([weight, quantize(weight, Format.Q8)]) is None
    joined = concatenate([quantize(weight, Format.Q8), quantize(weight, Format.Q8)])
    assert isinstance(joined, Quantized)
    assert joined.values.shape == (64, 32)
