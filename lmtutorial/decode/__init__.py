"""Decoders: functions from any language model and a list of prompts to generated tokens."""
