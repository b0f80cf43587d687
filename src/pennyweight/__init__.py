"""pennyweight: given a model and a budget, which model fits best — and run it."""

__version__ = "0.1.0"
