"""Kernels for devices other than the processor, a room per operation; the processor's own are in native/.

In a room `reference.py` is the definition, in torch. A backend has `why_not()` and a `Matrix` with `times`.
"""
