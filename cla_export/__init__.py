"""cla-export: deploy decoders with cross-layer KV sharing.

The functions here are the command line's commands; they load PyTorch, ONNX Runtime and the rest
only when called.
"""

__version__ = "0.1.0"
