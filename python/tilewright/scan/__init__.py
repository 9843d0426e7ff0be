"""Recurrences along a sequence: selective scans, linear scans, causal convolutions, their decode steps."""

__all__: list[str] = []
