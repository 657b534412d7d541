"""`oprd diagnose`: how alike two models are before training, and which settings suit them.

May be imported by cli only.
Start reading at `measure.py`; `advice.py` has the rules.
"""

from oprd.tools.diagnose.measure import diagnose_pair

__all__ = ["diagnose_pair"]
