"""The edge engine: a trained model as ONNX graphs (graphs.py), and what runs them without PyTorch
(engine.py).
"""
