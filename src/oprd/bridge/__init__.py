"""OPRD-Bridge (section 3): closed-form projections that make hidden states of two different models comparable.

May be imported by config and every later package.
Start reading at `bridge.py`; `fit.py` has the mathematics.
"""

from __future__ import annotations

from oprd.bridge.bridge import Bridge, BridgePair

__all__ = ["Bridge", "BridgePair"]
