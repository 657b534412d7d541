"""`oprd doctor`: what a run will need, computed from settings and model configs alone; no weights are loaded."""
