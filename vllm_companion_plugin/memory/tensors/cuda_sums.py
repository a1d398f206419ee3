"""The sums of memory/tensors/checksum.py on CUDA: one reading, at the speed of the memory, and nothing allocated.

torch's reductions would give the same numbers. They need two readings, 50 ms to load their kernels at the first use,
and 264 MiB of local memory that the driver sets aside until the process ends (docs/adr/0009).
https://docs.nvidia.com/cuda/nvrtc/
"""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

from cuda.bindings import driver, nvrtc

from vllm_companion_plugin.errors import ArenaError
from vllm_companion_plugin.memory.cuda_driver import call, primary_context

THREADS = 256
ROWS_A_BLOCK = 64

_SOURCE = """
typedef unsigned long long u64;

__device__ u64 weight(u64 number) {
    const u64 factors[] = {0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB};
    for (u64 factor : factors) {
        number *= factor;
        number ^= (u64)((long long)number >> 31);  // as torch shifts
    }
    return number;
}

// A block sums ROWS_A_BLOCK rows of THREADS pairs of words; `sums` has one number a piece and begins as zeros.
extern "C" __global__ void __launch_bounds__(THREADS)
sum_pieces(const ulonglong2* __restrict__ words, u64* sums, u64 rows) {
    __shared__ u64 row_weights[ROWS_A_BLOCK];
    __shared__ u64 total;
    const u64 first = (u64)blockIdx.x * ROWS_A_BLOCK;
    const u64 in_piece = first % PIECE_ROWS;
    if (threadIdx.x < ROWS_A_BLOCK) row_weights[threadIdx.x] = 2 * weight(1 + in_piece + threadIdx.x);
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    const u64 column = PIECE_ROWS + 1 + 2 * threadIdx.x;
    const u64 even = 2 * weight(column) + 1, odd = 2 * weight(column + 1) + 1;
    const int count = min((u64)ROWS_A_BLOCK, rows - first);
    words += first * THREADS + threadIdx.x;
    u64 sum = 0;
    #pragma unroll 8
    for (int row = 0; row < count; row++) {
        const ulonglong2 pair = words[row * THREADS];
        sum += pair.x * (even + row_weights[row]) + pair.y * (odd + row_weights[row]);
    }
    atomicAdd(&total, sum);
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(sums + first / PIECE_ROWS, total);
}
"""

_compiling = threading.Lock()


def launch(device_index: int, piece_rows: int, address: int, rows: int, sums_address: int, stream: int) -> None:
    """Start to add up pieces of memory, in the order of `stream`.

    Args:
        device_index: of the memory.
        piece_rows: rows of 4 KiB in a piece, a multiple of `ROWS_A_BLOCK`.
        address: of the first piece, which begins at a multiple of 16 bytes.
        rows: in all; the last piece may have fewer.
        sums_address: of one 64-bit zero for each piece, to which its sum is added.

    Raises:
        ArenaError: no kernel for this device, for want of NVRTC say, or the driver's words.
    """
    kernel = compiled(device_index, piece_rows)
    blocks = -(-rows // ROWS_A_BLOCK)
    values = ((address, sums_address, rows), (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64))
    with primary_context(device_index):
        call("Summing", driver.cuLaunchKernel(kernel, blocks, 1, 1, THREADS, 1, 1, 0, stream, values, 0))


def compiled(device_index: int, piece_rows: int) -> Any:
    """The kernel, compiled at the first call (15 ms, and 50 to find and load NVRTC). Raises as `launch`."""
    with _compiling:  # a second thread waits here until the first has compiled
        return _compiled(device_index, piece_rows)


@functools.cache
def _compiled(device_index: int, piece_rows: int) -> Any:
    context = primary_context(device_index)
    attribute = driver.CUdevice_attribute
    major, minor = (
        call("cuDeviceGetAttribute", driver.cuDeviceGetAttribute(which, context.device))
        for which in (
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    names = {"THREADS": THREADS, "ROWS_A_BLOCK": ROWS_A_BLOCK, "PIECE_ROWS": piece_rows}
    options = [f"--gpu-architecture=sm_{major}{minor}", *(f"-D{name}={value}" for name, value in names.items())]
    try:
        program = _nvrtc(nvrtc.nvrtcCreateProgram(_SOURCE.encode(), b"sum_pieces.cu", 0, [], []))
        _nvrtc(nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options]))
        binary = bytes(_nvrtc(nvrtc.nvrtcGetCUBINSize(program)))
        _nvrtc(nvrtc.nvrtcGetCUBIN(program, binary))
        _nvrtc(nvrtc.nvrtcDestroyProgram(program))
    except (RuntimeError, ImportError, OSError) as error:  # the library is not there
        raise ArenaError(f"NVRTC cannot be used: {error}") from error
    with context:
        module = call("Loading a kernel", driver.cuModuleLoadData(binary))
        return call("Loading a kernel", driver.cuModuleGetFunction(module, b"sum_pieces"))


def _nvrtc(result: tuple[Any, ...]) -> Any:
    error, *values = result
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        _, name = nvrtc.nvrtcGetErrorString(error)
        raise ArenaError(f"NVRTC failed: {name.decode()}.")
    return values[0] if values else None
