"""An inference engine for GPT-2 family models."""
