"""The parts of sample.py: settings, the block loop and the reveal rules on numpy arrays, a PyTorch
model as they see one, fast weights, the terminal view.
"""
