"""The processor's instructions for products of bytes, which decide the largest weights of an int8 model.

/proc/cpuinfo -> flags of each processor -> find_16_bit_sums -> check_weight_bits: UserError or nothing

Without VNNI, x86 adds two products of a byte and a weight in 16 bits. 2 * 255 * 63 fits, 2 * 255 * 127 does not: the sum becomes
32767. ONNX Runtime and oneDNN (OpenVINO) choose their integer kernels as `_find_missing` says. ARM's dot product adds in 32 bits.
"""

from pathlib import Path

from mura_dist.core.errors import UserError
from mura_dist.distributed.processes import processor_flags
from mura_dist.inference.engine import PROVIDERS

_CPUINFO = Path("/proc/cpuinfo")  # of Linux; other systems have none
_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}  # of both libraries' AVX-512 kernels
_ON_GPU = {name.lower() for alias in ("cuda", "tensorrt") for name in (alias, PROVIDERS[alias])}


def check_weight_bits(bits: int | None, subject: str, remedy: str, *, provider: str = "cpu") -> None:
    """Check that this processor computes weights of `bits` exactly. A GPU computes them as floats.

    Args:
        bits: Bits of an int8 model's weights; None for another model.
        subject: Names the file or the option, for the message.
        remedy: A sentence, for the message.
        provider: Provider as named in `--provider`.

    Raises:
        UserError: the sums of products may overflow, or the processor is unknown.
    """
    if bits != 8 or provider.lower() in _ON_GPU:
        return
    reason = find_16_bit_sums(_CPUINFO.read_text(encoding="utf-8", errors="replace") if _CPUINFO.is_file() else "")
    if reason is not None:
        raise UserError(
            f"{subject}: weights of 8 bits would overflow on this processor (limit: 7 bits; {reason}). {remedy}"
        )


def find_16_bit_sums(cpuinfo: str) -> str | None:
    """Return why a processor in the text of /proc/cpuinfo may add products of bytes in 16 bits; None if none does."""
    processors = processor_flags(cpuinfo)
    if not processors:
        return "its instructions are unknown, because Linux's /proc/cpuinfo is missing or names none"
    return next(filter(None, map(_find_missing, processors)), None)


def _find_missing(flags: set[str]) -> str | None:
    if "avx2" not in flags:  # ARM, or an x86 before 2013
        return None if "asimddp" in flags else "it has neither VNNI nor ARM's dot product"
    # A processor with AVX-512 but without its VNNI uses the AVX-512 kernels, which add in 16 bits, even if it has AVX-VNNI.
    missing = {"avx512_vnni"} if flags >= _AVX512 else {"avx_vnni"}
    return "it has no VNNI" if missing - flags else None
