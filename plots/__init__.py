"""Figures from stored rows. Functions take rows and an Axes; nothing here computes a number.

`python -m plots DIR` reads what `python -m sweeps run` wrote and draws DIR/_figures/*.png, *.svg.
Imports neither jax nor jaxattn nor sweeps: rows from anywhere will do, if they have the columns.
"""
