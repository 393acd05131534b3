"""A trained model in the visitor's browser, without a server: what python -m export --format web
writes. folder.py puts the folder together; the JavaScript here is what runs in the browser, as it
is: no build step, no package but ONNX Runtime's.
"""
