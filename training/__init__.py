"""The parts of train.py: set-up, the step, the optimizer, recovery, several processes, the run
folder, logs.
"""
