"""A GPU that is made up, as `CudaMemory` shows it: what it is, and how much memory is in use."""

ALL = 80 << 30  # bytes of memory


class Gpu:
    """Allocations are numbers alone; what is freed is held until `trim`."""

    name, stream, multiprocessors = "NVIDIA H200", 7, 132
    compute_capability, capability = "9.0", (9, 0)

    def __init__(self) -> None:
        self.used, self.held = 1 << 30, 0
        self.blocks: dict[int, int] = {}
        self.allocations = 0

    def read_driver(self) -> str:
        return "580.65.06"

    def read_free(self) -> tuple[int, int]:
        return ALL - self.used - self.held, ALL

    def trim(self) -> None:
        self.held = 0

    def allocate(self, size: int) -> int:
        self.allocations += 1
        address = self.allocations << 40
        self.blocks[address] = size
        self.used += size
        return address

    def free(self, address: int) -> None:
        size = self.blocks.pop(address)
        self.used, self.held = self.used - size, self.held + size
