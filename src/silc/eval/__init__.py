"""Evaluation: one module a task, found by `run`; metrics, prompts, features and protocols are shared by all."""
