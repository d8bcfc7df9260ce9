"""Deploying a bundle where one server on one machine is not what is wanted.

triton          a model of a Triton model repository
triton_config   its tensors and parameters     triton_model    what Triton's backend runs
triton_tensors  between the two
"""
