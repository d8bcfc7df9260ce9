"""Fused attention over a cache that layers share: contract, references, CUDA kernel, launchers."""
