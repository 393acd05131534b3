"""The parts of evaluate.py, report.py and run_experiments.py: estimators, quality of samples,
checks, reports, pictures.
"""
