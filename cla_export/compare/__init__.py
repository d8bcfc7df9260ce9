"""The parity gate: is the bundle the same model as its PyTorch reference?"""
