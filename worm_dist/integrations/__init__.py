"""Integrations: the engine in Lightning, in Hugging Face's Trainer and in Accelerate."""
