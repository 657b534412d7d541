"""E13: accuracy beside TRL's distillation trainers, at equal steps and at equal seconds."""
