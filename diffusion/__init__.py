"""Older command names, so that pasted commands work (`python -m diffusion.train_eco_hybrid`, ...).
No logic here.
"""
