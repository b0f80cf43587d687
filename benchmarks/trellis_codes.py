"""Are the constants of the trellis codes (native/trellis.h) good ones?

A code is a multiplier and a bend. Normally distributed numbers are coded by Viterbi's algorithm, written here a second
time over a table of values, at the best of several scales. The measure is the mean squared error over that which no
code of so many bits can go below, 4^-bits. Other multipliers and bends are drawn and tried; the codes that ship must be
as good as the best of them but for a small part, and better by far than rounding to the best evenly spaced values.
With --quick fewer are tried, on fewer numbers.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

import _bench
from pennyweight.formats import trellis

WINDOWS = {2: 10, 3: 9, 4: 10, 5: 9, 6: 10}
BENDS = ((9, 16384), (13, 16384), (13, 19661))  # power; how much of it, in 2^-15
SCALES = (0.85, 0.92, 1.0, 1.08, 1.17)
EVEN = {2: 0.1188, 3: 0.03744, 4: 0.01154, 5: 0.00349, 6: 0.00104}  # Max, Quantizing for minimum distortion, table II


@dataclass(frozen=True)
class Tried:
    """A code that does not ship."""

    bits: int
    multiplier: int
    power: int
    share: int

    def values(self) -> np.ndarray:
        """As native/trellis.h computes them, by state."""
        window = WINDOWS[self.bits]
        state = np.arange(1 << window, dtype=np.int64)
        t = ((state << (16 - window)) * self.multiplier + (1 << (15 - window))).astype(np.uint16).astype(np.int16)
        t = t.astype(np.int64)
        two = _times(t, t)
        four = _times(two, two)
        even = _times(four, four)
        even = _times(even, four) if self.power == 13 else even
        return _times(t, 32768 - self.share + _times(even, self.share))


def _times(a: np.ndarray, b: np.ndarray | int) -> np.ndarray:
    return (a * b + 0x4000) >> 15


def error(values: np.ndarray, bits: int, x: torch.Tensor) -> float:
    """Mean squared error of x (sequences, length) at the best of the scales, over 4^-bits."""
    table = torch.from_numpy(values.astype(np.float32))
    expected = _deviation(table, bits)
    return min(_squared(table * (scale * expected), bits, x) for scale in SCALES) * 4**bits


def _deviation(table: torch.Tensor, bits: int) -> float:
    """The scale at which values have the deviation of the numbers, or a little more: of many bits the ends are rare."""
    return {2: 1.0, 3: 1.0, 4: 1.05, 5: 1.15, 6: 1.25}[bits] / float(table.std())


def _squared(table: torch.Tensor, bits: int, x: torch.Tensor) -> float:
    window = WINDOWS[bits]
    rest = 1 << (window - bits)
    # State s = newest symbol * rest + what is left of older ones; what is left of it next is s >> bits.
    cost = torch.full((len(x), len(table)), torch.inf)
    cost[:, 0::rest] = 0
    cost = cost + (x[:, :1] - table).square()
    for step in range(1, x.shape[1]):
        best = cost.view(len(x), rest, 1 << bits).amin(dim=-1)
        cost = best.repeat(1, 1 << bits) + (x[:, step, None] - table).square()
    return float(cost.amin(dim=1).mean()) / x.shape[1]


def main() -> int:
    """Run the claim; returns the exit code."""
    arguments = _bench.parser(__doc__).parse_args()
    tried, length = (6, 256) if arguments.quick else (100, 1024)
    draw = np.random.default_rng(0)
    x = torch.from_numpy(draw.standard_normal((8 if arguments.quick else 16, length)).astype(np.float32))
    again = torch.from_numpy(draw.standard_normal(x.shape).astype(np.float32))
    bars, keys, began = [], {}, time.perf_counter()
    for bits in trellis.WIDTHS:
        shipped = error(trellis.values(bits), bits, x)
        found = []
        for _ in range(tried):
            multiplier = int(draw.integers(0, 1 << 15)) * 2 + 1
            for bend in BENDS:
                code = Tried(bits, multiplier, *bend)
                found.append((error(code.values(), bits, x), code))
        found.sort(key=lambda each: each[0])
        # The best of many is best by chance too: on other numbers.
        best = min(error(code.values(), bits, again) for _, code in found[:3])
        own = error(trellis.values(bits), bits, again)
        keys[f"error_{bits}"], keys[f"best_tried_{bits}"] = round(own, 4), round(best, 4)
        bars.append(_bench.bar(f"{bits} bits: error over that of the best tried", round(own / best, 4), "<=", 1.02))
        bars.append(_bench.bar(f"{bits} bits: over rounding's", round(own / (EVEN[bits] * 4**bits), 4), "<=", 0.8))
        print(
            f"{bits} bits: {own:.4f} times the least possible ({shipped:.4f} on the numbers for trying); best of "
            f"{len(found)} tried {best:.4f}, {found[0][1]}; rounding {EVEN[bits] * 4**bits:.4f}; "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )
    return _bench.finish("trellis_codes.py", arguments.quick, keys, bars)


if __name__ == "__main__":
    sys.exit(main())
