"""The native kernels: equal among instruction sets, equal to float64, clean under sanitizers, the same on Arm."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

NATIVE = Path(__file__).resolve().parents[1] / "native"
CXX = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
_native = pytest.importorskip("pennyweight._native", reason="the native module was not built: no C++ compiler")

X86 = {
    "kernels_avx2.cpp": ("-mavx2", "-mfma", "-mf16c"),
    "kernels_avx512.cpp": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c"),
}
SOURCES = [NATIVE / name for name in ("kernels.cpp", "kernels_scalar.cpp", "kernels_neon.cpp", "check_kernels.cpp")]
# GCC takes the undefined registers of its own intrinsics for uninitialised ones.
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-uninitialized", "-Wno-maybe-uninitialized")


def compiled(folder: Path, compiler: str, flags: tuple[str, ...], per_file: dict[str, tuple[str, ...]]) -> Path:
    """check_kernels as a program, every kernel file with the flags of its instruction set."""
    objects = []
    base = (compiler, "-std=c++20", "-Og", "-g1", *WARNINGS, *flags)  # -O1 takes three times as long
    for name, own in per_file.items():
        objects.append(folder / f"{name}.o")
        subprocess.run([*base, *own, "-c", NATIVE / name, "-o", objects[-1]], check=True)
    program = folder / "check_kernels"
    subprocess.run([*base, *SOURCES, *objects, "-o", program], check=True)
    return program


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="builds the x86 kernels; those of Arm run in qemu below")
@pytest.mark.skipif(CXX is None, reason="no C++ compiler")
@pytest.mark.timeout(300)
def test_instruction_sets_agree_and_sanitizers_are_silent(tmp_path):
    # What this processor does not run is not compiled for it: it takes longer than all the others.
    flags = {name: own if name[8:-4] in _native.kernel_names() else () for name, own in X86.items()}
    program = compiled(tmp_path, str(CXX), ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"), flags)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    checked = done.stdout.split()
    assert all(name in checked for name in _native.kernel_names() if name != "scalar")


CROSS, QEMU = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")


@pytest.mark.skipif(not (CROSS and QEMU), reason="needs g++-aarch64-linux-gnu and qemu-user-static")
@pytest.mark.timeout(300)
def test_arm_kernels_in_qemu(tmp_path):
    flags = ("-static", "-march=armv8.2-a+dotprod+fp16")
    program = compiled(tmp_path, str(CROSS), flags, dict.fromkeys(X86, ()))
    done = subprocess.run([str(QEMU), program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "neon checked" in done.stdout


def rows_matrix(rng: np.random.Generator, rows: int, cols: int, bits: int, group: int):
    """A packed matrix and what it stands for in float64."""
    codes = rng.integers(0, 2**bits, (rows, cols), dtype=np.uint8)
    scales = rng.uniform(0.5, 1.5, (rows, cols // group)).astype(np.float16)
    dense = (codes.astype(float) - 2 ** (bits - 1)) * scales.astype(float).repeat(group, axis=1)
    packed = codes if bits == 8 else codes[:, 0::2] | np.pad(codes[:, 1::2], ((0, 0), (0, cols % 2))) << 4
    made = _native.Matrix.rows(np.ascontiguousarray(packed), scales.view(np.uint16), None, cols, bits, group, False)
    return made, dense


def product(matrix, kernels: str):
    linear = _native.Linear()
    linear.add(matrix)
    return _native.Product(linear, 1, kernels)


def activations(rng: np.random.Generator, tokens: int, cols: int) -> np.ndarray:
    """Normal, with a few channels twelve times as large, as language models have them."""
    x = rng.standard_normal((tokens, cols)).astype(np.float32)
    x[:, rng.random(cols) < 0.004] *= 12
    return x


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("kernels", _native.kernel_names())
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "cols", "group"), [(1, 32, 32), (63, 257, 257), (257, 512, 64), (48, 1024, 128)])
def test_products_with_packed_rows(kernels, bits, rows, cols, group):
    """Only the activations are rounded, to 8 bits: within 1 % of float64, outliers included."""
    rng = np.random.default_rng(rows + bits)
    matrix, dense = rows_matrix(rng, rows, cols, bits, group)
    assert matrix.shape == (rows, cols)
    row = np.full(cols, np.nan, np.float32)
    matrix.row(rows - 1, row)
    np.testing.assert_array_equal(row, dense[-1].astype(np.float32))
    x, y = activations(rng, 3, cols), np.full((3, rows), np.nan, np.float32)
    product(matrix, kernels).run(x, y)
    assert relative(y, x @ dense.T) < 0.01


@pytest.mark.parametrize("kernels", _native.kernel_names())
def test_products_with_16_bit_rows_are_float32(kernels):
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((63, 257)).astype(np.float16)
    x, y = activations(rng, 5, 257), np.full((5, 63), np.nan, np.float32)
    product(_native.Matrix.wide(dense.view(np.uint8), _native.Float.float16), kernels).run(x, y)
    assert relative(y, x.astype(float) @ dense.astype(float).T) < 1e-6


def test_what_does_not_fit_is_refused():
    codes, scales = np.zeros((4, 16), np.uint8), np.zeros((4, 1), np.uint16)
    with pytest.raises(ValueError, match="columns / group"):
        _native.Matrix.rows(codes, scales, None, 32, 4, 16, False)
    with pytest.raises(ValueError, match="groups of whole 32"):
        _native.Matrix.rows(codes, np.zeros((4, 2), np.uint16), None, 32, 4, 16, False)
    with pytest.raises(ValueError, match="too few bytes"):
        _native.Matrix.rows(codes, scales, None, 64, 4, 64, False)
    with pytest.raises(ValueError, match="does not have 64 bytes"):
        _native.Matrix.zigzag(np.zeros(64, np.uint8), 128, 2, 128, 64, _native.Scales.symmetric)
