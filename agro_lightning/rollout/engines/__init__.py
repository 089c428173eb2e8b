"""Rollout engines: one module each."""
