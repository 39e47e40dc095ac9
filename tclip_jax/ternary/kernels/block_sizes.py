"""Block sizes of the TPU kernel and the VMEM that they may fill, by kind of device."""

from __future__ import annotations

import dataclasses
import math

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Device:
    """What a kind of TPU gives the kernel.

    Attributes:
      vmem: bytes that the kernel may ask for.
      rows, columns: the largest block of the output. Activations are read once for every block of columns: 1024 keep
        the product above the ridge of HBM on v4, v5e and v5p, 2048 on v6e.
      int8: whether the matrix unit multiplies int8.
    """

    vmem: int
    rows: int = 512
    columns: int = 1024
    int8: bool = True

    @property
    def usable(self) -> int:
        """The bytes for blocks; the compiler's own needs stay within the rest."""
        return self.vmem * 3 // 4


# The kinds that the kernels are compiled for; half of the VMEM stays with XLA where there is more than 16 MiB.
DEVICES = {
    "TPU v4": Device(16 * MIB, int8=False),
    "TPU v5 lite": Device(64 * MIB),
    "TPU v5": Device(32 * MIB),
    "TPU v6 lite": Device(64 * MIB, columns=2048),
}
SMALLEST = Device(16 * MIB)  # fits each of them
# So few rows cost less than the weights: narrower blocks start the pipeline sooner, scaling sums beats scaling weights.
FEW_ROWS = 256


def vmem(rows: int, k: int, columns: int, activation: int, output: int) -> int:
    """Bytes that the kernel holds for one block: activations, packed words and output twice, for the pipeline; the
    unpacked weights, of the item size of the activations, and the f32 sums once."""
    return 2 * rows * k * activation + k * columns // 2 + k * columns * activation + rows * columns * (2 * output + 4)


def block_sizes(device: Device, rows: int, k: int, columns: int, activation: int, output: int) -> tuple[int, int]:
    """Rows and columns of a block of the product of (rows, k) and (k, columns), operands of these item sizes.

    Blocks split their axis evenly, so that little of the last one is wasted, and are halved until VMEM holds them.

    Raises:
      ValueError: not even the smallest block, 32 x 128, fits.
    """
    limits = [device.rows, min(device.columns, 512) if rows <= FEW_ROWS else device.columns]
    if activation == 4:
        limits = [128, 256]  # the six passes of float32 are unrolled: larger blocks take a minute to compile
    while True:
        m, n = _split(rows, limits[0], 32), _split(columns, limits[1], 128)
        if vmem(m, k, n, activation, output) <= device.usable:
            return m, n
        if m <= 32 and n <= 128:
            raise ValueError(f"K of {k} does not fit the {device.vmem // MIB} MiB of VMEM")
        largest = 0 if n <= 128 or (m > 32 and m > n) else 1
        limits[largest] = max((m, n)[largest] // 2, (32, 128)[largest])


def _split(size: int, limit: int, tile: int) -> int:
    """The block that splits `size` into equal parts of at most `limit`, in whole tiles; all of it where it fits."""
    if size <= limit:
        return size
    parts = math.ceil(size / limit)
    return math.ceil(size / (parts * tile)) * tile
