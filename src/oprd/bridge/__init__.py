"""OPRD-Bridge (section 3): what a student's and a differently built teacher's states have in common, fitted in closed form."""

from __future__ import annotations

from oprd.bridge.bridge import Bridge, BridgePair

__all__ = ["Bridge", "BridgePair"]
