"""Deploying a bundle where one server on one machine is not what is wanted.

ray_*           replicas behind Ray Serve: ray_plan reads the options, ray_replica is one engine,
                ray_local runs them here, ray_config writes a config for a cluster
triton          a model of a Triton model repository
triton_config   its tensors and parameters      triton_model    what Triton's backend runs
triton_tensors  between the two                 triton_metrics  the engine's, told to Triton
kubernetes      manifests for a cluster         host_memory     what a pod asks for
image           what an image has to have installed
"""
