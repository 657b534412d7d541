"""`oprd diagnose`: what two models have in common, before anything is trained."""

from oprd.tools.diagnose.measure import diagnose_pair

__all__ = ["diagnose_pair"]
