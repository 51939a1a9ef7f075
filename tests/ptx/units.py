"""What the units of a multiprocessor do in a cycle, and how long a launch keeps each of them busy at the least."""

from typing import NamedTuple

SECTOR = 32  # bytes of global memory that are moved together
WAVEFRONT = 128  # bytes of shared memory in a cycle: 32 banks of 4
LANES = 32

# Per multiprocessor and cycle. Sources:
# - FLOP on matrix units, dense bfloat16: NVIDIA's white papers on the A100 (312 TFLOP/s, 108 multiprocessors, 1.41 GHz)
#   and the H100 SXM (989 TFLOP/s, 132, 1.83 GHz). On an H100 only wgmma reaches it; mma.sync gets about two thirds.
# - exp (and every other function of the special function unit), fp32, int: CUDA C++ Programming Guide, "Throughput of
#   Native Arithmetic Instructions", compute capability 8.0 and 9.0.
# - wavefronts: one of 32 banks of 4 bytes, the same guide, "Shared Memory".
# - sectors: 64 bytes, the width of the way from the L2 cache to one multiprocessor. All of them together get less (the
#   white paper on the A100: 5120 bytes, 47 a multiprocessor). What the L1 cache holds does not come that way.
# - instructions of warps: four schedulers, one each; the same guide, sections on 8.x and 9.0.
RATES = {
    "sm_80": {"matrix": 2048, "exp": 16, "fp32": 64, "int": 64, "shared": 1, "global": 2, "issue": 4},
    "sm_90": {"matrix": 4096, "exp": 16, "fp32": 128, "int": 64, "shared": 1, "global": 2, "issue": 4},
}


class Work(NamedTuple):
    """What was done in launches of a kernel, by the machine's counts; these are the numbers that are kept."""

    launches: int = 0
    blocks: int = 0
    matrix_flop: int = 0
    """Issued, those of masked and padded elements too."""
    exp: int = 0
    other_special: int = 0
    """Reciprocals, logarithms and the like, which take the same unit."""
    fp32: int = 0
    int: int = 0
    shuffles: int = 0
    wavefronts: int = 0
    """Passes through the banks of shared memory, by threads and by cp.async."""
    least_wavefronts: int = 0
    """How many there would be without bank conflicts."""
    operand_bytes: int = 0
    """Of shared memory, read by matrix units on their own (wgmma, TMA) and written by TMA: these meet no conflicts."""
    sectors: int = 0
    """Of 32 bytes of global memory that instructions read and write, as if the L1 cache held none."""
    barriers: int = 0
    """Of a warp."""
    instructions: int = 0
    """Of warps."""

    @classmethod
    def of(cls, counts: dict[str, int], blocks: int) -> "Work":
        """Of one launch."""

        def total(*endings: str) -> int:
            return sum(count for name, count in counts.items() if name.endswith(endings))

        return cls(
            launches=1,
            blocks=blocks,
            matrix_flop=counts["MMA_FLOP"] + counts["WGMMA_FLOP"],
            exp=counts["EX2"],
            other_special=counts["MUFU"],
            fp32=counts["F32"] + counts["FMA32"],
            int=counts["INT"],
            shuffles=counts["SHUFFLES"],
            wavefronts=total("_WAVEFRONTS"),
            least_wavefronts=total("_LEAST"),
            operand_bytes=counts["WGMMA_SHARED_BYTES"] + counts["TMA_BYTES"] + counts["TMA_STORE_BYTES"],
            sectors=total("_SECTORS") + -(-(counts["TMA_BYTES"] + counts["TMA_STORE_BYTES"]) // SECTOR),
            barriers=counts["BARRIERS"],
            instructions=counts["WARP_INSTRUCTIONS"],
        )

    def __add__(self, other: "Work") -> "Work":
        return Work(*map(sum, zip(self, other, strict=True)))

    def cycles(self, target: str) -> dict[str, float]:
        """That each unit of one multiprocessor needs at the least, if it does all the blocks."""
        work = {
            "matrix": self.matrix_flop,
            "exp": self.exp + self.other_special,
            "fp32": self.fp32,
            "int": self.int,
            "shared": self.wavefronts + self.operand_bytes / WAVEFRONT,
            "global": self.sectors,
            "issue": self.instructions,
        }
        return {unit: work[unit] / rate for unit, rate in RATES[target].items()}
