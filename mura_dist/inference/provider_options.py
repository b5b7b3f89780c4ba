"""The options of ONNX Runtime's providers, as a pure function that can be tested without a GPU.

provider, precision, shape of a batch, GPU -> options by ONNX Runtime's names

The options for GPUs have not been measured on a GPU yet: see docs/prediction.md.
"""

from pathlib import Path

from mura_dist.inference.engine import PROVIDERS
from mura_dist.models.card import Precision


def provider_options(
    provider: str, precision: Precision, shape: tuple[int, int, int, int], device: int, engine_folder: Path
) -> dict[str, str]:
    """Return the options of an ONNX Runtime provider; {} for providers other than CUDA and TensorRT.

    Args:
        provider: ONNX Runtime's name of the provider.
        precision: Precision of the file.
        shape: (B, 1, S, S) of `image` in every run. Smaller batches are padded.
        device: Number of the GPU.
        engine_folder: Folder in which TensorRT caches the engine for this model and shape.
    """
    is_half = precision == "fp16"
    if provider == PROVIDERS["cuda"]:
        return {
            "device_id": str(device),
            # TF32 keeps 3 of 7 digits, so that fp32 logits would exceed the parity gate's 1e-4. Switched off, it also keeps cuDNN
            # from the tensor cores for fp16. An fp16 file has no fp32 product that TF32 could round.
            "use_tf32": "1" if is_half else "0",
            # The more thorough of cuDNN's heuristics since ONNX Runtime 1.20. It times nothing: each start chooses the same
            # algorithm. It takes longer, once per shape, and there is only one shape.
            "cudnn_conv_algo_search": "EXHAUSTIVE",
            # Tensor cores need the channels last. In NCHW each fp16 convolution would be transposed twice.
            "prefer_nhwc": "1" if is_half else "0",
        }
    if provider == PROVIDERS["tensorrt"]:
        profile = f"image:{'x'.join(map(str, shape))}"
        return {
            "device_id": str(device),
            "trt_fp16_enable": "1" if is_half else "0",
            # The one shape of every run. Without a profile TensorRT builds the engine for the first batch and, which takes
            # minutes, again for the first smaller batch.
            "trt_profile_min_shapes": profile,
            "trt_profile_opt_shapes": profile,
            "trt_profile_max_shapes": profile,
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(engine_folder),
            "trt_timing_cache_enable": "1",
        }
    return {}
