"""The parts of sample.py: settings, the block loop, the reveal rules, fast weights, the terminal
view.
"""
