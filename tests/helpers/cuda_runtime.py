"""A stand-in for the CUDA runtime's functions for page-locked memory, on a machine without a GPU."""

import ctypes


class Runtime:
    """CUDA runtime functions on libc's memory, with a log of the calls: (name, address or device)."""

    def __init__(self, error: int = 0) -> None:
        self.error, self.calls = error, list[tuple[str, int]]()
        self.libc = ctypes.CDLL(None)
        self.libc.calloc.restype, self.libc.calloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t, ctypes.c_size_t)
        self.libc.free.argtypes = (ctypes.c_void_p,)

    def cudaSetDevice(self, device: ctypes.c_int) -> int:
        self.calls.append(("device", device.value))
        return 0

    def cudaHostAlloc(self, address: object, num_bytes: ctypes.c_size_t, flags: ctypes.c_uint) -> int:
        if self.error:
            self.calls.append(("refused", 0))
            return self.error
        pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_void_p))  # type: ignore[arg-type]
        pointer[0] = self.libc.calloc(1, num_bytes)
        self.calls.append(("allocate", pointer[0]))
        return 0

    def cudaFreeHost(self, address: ctypes.c_void_p) -> int:
        self.calls.append(("free", address.value or 0))
        self.libc.free(address)
        return 0

    def cudaGetLastError(self) -> int:
        self.calls.append(("forget", self.error))
        return self.error

    def of(self, *names: str) -> list[tuple[str, int]]:
        return [call for call in self.calls if call[0] in names]
