"""OPRD: on-policy distillation of language models by hidden states."""
