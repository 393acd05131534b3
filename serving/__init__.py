"""The parts of serve.py: HTTP, what a request may ask for, the queue before the model, the answers.
"""
