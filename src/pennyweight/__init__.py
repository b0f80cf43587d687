"""pennyweight: given a model and a budget, which model fits best — and run it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pennyweight.api import Result, fit, load, plan
    from pennyweight.config import BudgetConfig as Budget
    from pennyweight.config import DemandConfig as Demand
    from pennyweight.config import FitConfig as Config
    from pennyweight.config import WorkloadConfig as Workload
    from pennyweight.prices.machine import Machine

__all__ = ["Budget", "Config", "Demand", "Machine", "Result", "Workload", "fit", "load", "plan"]

_WHERE = {
    "fit": ("api", "fit"),
    "load": ("api", "load"),
    "plan": ("api", "plan"),
    "Result": ("api", "Result"),
    "Budget": ("config", "BudgetConfig"),
    "Config": ("config", "FitConfig"),
    "Demand": ("config", "DemandConfig"),
    "Workload": ("config", "WorkloadConfig"),
    "Machine": ("prices.machine", "Machine"),
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import pennyweight` alone must not load torch."""
    if name not in _WHERE:
        raise AttributeError(f"module 'pennyweight' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    return getattr(importlib.import_module(f"pennyweight.{module}"), attribute)
