"""What TensorRT-RTX does with a graph when nobody looks at it first. Run as a process of its own:
some of these graphs kill it.

    python outcome.py MODEL     prints refused, or built
"""

import sys
from pathlib import Path

SIZES = {"B": (1, 1, 2), "S": (1, 1, 4), "C": (32, 32, 32)}


def main(path: Path) -> str:
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(path.read_bytes()):
        return "refused"
    import onnx

    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for value in onnx.load(path).graph.input:
        dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        shapes = [[SIZES[d][i] if isinstance(d, str) else d for d in dims] for i in range(3)]
        profile.set_shape(value.name, *shapes)
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    return "refused" if builder.build_serialized_network(network, config) is None else "built"


if __name__ == "__main__":
    sys.stdout.write(main(Path(sys.argv[1])) + "\n")
