"""Choose the options of ONNX Runtime's providers: a pure function of what is computed, tested where no provider starts.

provider, precision, shape of the one batch, GPU -> the provider's options, by ONNX Runtime's names

Of what is asked for here for GPUs nothing has been measured on one yet; docs/prediction.md says so.
"""

from pathlib import Path

from mura_dist.inference.engine import PROVIDERS
from mura_dist.models.card import Precision


def provider_options(
    provider: str, precision: Precision, shape: tuple[int, int, int, int], device: int, engine_folder: Path
) -> dict[str, str]:
    """Return the options of an ONNX Runtime provider, by its own name; none for those of which nothing is known.

    Args:
        precision: what the file is to be computed in.
        shape: (B, 1, S, S) of `image`, that of every run: the session pads smaller batches.
        device: number of the GPU.
        engine_folder: where TensorRT keeps the engine it builds for this model and shape.
    """
    half = precision == "fp16"
    if provider == PROVIDERS["cuda"]:
        return {
            "device_id": str(device),
            # TF32 keeps 3 digits of 7: logits of fp32 would leave the parity gate's 1e-4. Without it cuDNN is kept from all
            # tensor cores, also fp16's; and an fp16 file has no product in fp32 that TF32 could round.
            "use_tf32": "1" if half else "0",
            # The more careful of cuDNN's heuristics, since ONNX Runtime 1.20: nothing is timed, hence it chooses alike at each
            # start. It takes longer, once a shape, and the shape is always the same.
            "cudnn_conv_algo_search": "EXHAUSTIVE",
            # Tensor cores want the channels last: in NCHW each convolution of fp16 would be transposed twice.
            "prefer_nhwc": "1" if half else "0",
        }
    if provider == PROVIDERS["tensorrt"]:
        profile = f"image:{'x'.join(map(str, shape))}"
        return {
            "device_id": str(device),
            "trt_fp16_enable": "1" if half else "0",
            # One shape, which every run has. Without a profile the engine is built for the first batch, and again, which takes
            # minutes, for the first one that is smaller.
            "trt_profile_min_shapes": profile,
            "trt_profile_opt_shapes": profile,
            "trt_profile_max_shapes": profile,
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(engine_folder),
            "trt_timing_cache_enable": "1",
        }
    return {}
