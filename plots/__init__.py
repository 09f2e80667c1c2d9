"""Plots: records -> DataFrame (frame.py) -> Figure (figure1.py, time.py) -> files (style.py)."""
