"""An exported model as a repository that a stock NVIDIA Triton server loads.

    model.onnx -> DIR/mura_dist/1/model.onnx, then DIR/mura_dist/config.pbtxt (written last)

A client sends one or more images (1, S, S) uint8 and gets for each a logit (1) and an activation map (h, w); requests are
batched on the way. It never sees the file: what it needs to use the answers rightly, all of the card but metrics and recipe,
is in the configuration's parameters, which the server shows at /v2/models/mura_dist/config.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import onnx

from mura_dist import __version__
from mura_dist.core import files
from mura_dist.core.errors import UserError
from mura_dist.models.card import KEY, Card

NAME = "mura_dist"  # of the model and, as Triton wants it, of its folder
MAX_BATCH = 64  # the largest that the parity gate compares
_MARK = "# Written by mura-dist "
_TYPES = {
    onnx.TensorProto.UINT8: "TYPE_UINT8",
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
}


def check(repository: Path) -> None:
    """UserError where `repository` cannot take the model: asked before the work, which takes a minute."""
    folder = repository / NAME
    files.check_folder(folder / "1", "--triton")
    config = folder / "config.pbtxt"
    if config.exists() and not (config.is_file() and config.read_bytes().startswith(_MARK.encode())):
        raise UserError(
            f"--triton {repository}: {config} is not of mura-dist, another model has that name; give another folder, or move "
            f"{folder} away"
        )


def write(repository: Path, data: bytes) -> None:
    """Lay the ONNX file `data` out below `repository`, beside the other models there, in place of an earlier export.

    Killed in between, there is a model without a configuration, for which Triton works out shapes itself; never a model
    with the configuration of another.
    """
    check(repository)
    folder = repository / NAME
    (folder / "config.pbtxt").unlink(missing_ok=True)
    files.write_bytes(folder / "1" / "model.onnx", data)
    files.write_text(folder / "config.pbtxt", config(data))


def config(data: bytes) -> str:
    """config.pbtxt of the ONNX file `data`: Triton's ModelConfig as protobuf's text."""
    model = onnx.load_from_string(data)
    card = Card.parse({entry.key: entry.value for entry in model.metadata_props}.get(KEY), "the exported model")
    tensors = {value.name: _tensor(value.type.tensor_type) for value in (*model.graph.input, *model.graph.output)}
    told = card.model_dump(exclude={"metrics", "recipe"}) | {"model_sha256": hashlib.sha256(data).hexdigest()}
    return _CONFIG.format(
        mark=_MARK,
        version=__version__,
        terms=" ".join(card.terms.split()),
        name=NAME,
        max_batch=MAX_BATCH,
        key=KEY,
        card=json.dumps(told).replace("\\", "\\\\").replace('"', '\\"'),
        **tensors,
    )


def _tensor(kind: Any) -> str:
    """Type and dimensions of an input or output, without the batch, which Triton adds itself."""
    dims = [dim.dim_value for dim in kind.shape.dim[1:]]
    # The server has no output of no dimensions: a client sees (N, 1) where the model gives (N,).
    shape = f"dims: [ {', '.join(map(str, dims))} ]" if dims else "dims: [ 1 ] reshape { shape: [ ] }"
    return f"data_type: {_TYPES[kind.elem_type]} {shape}"


# Not said, since the server's own choice is right on any machine: instance_group (one on each GPU; without GPUs two on the
# CPU) and preferred_batch_size (any up to the largest). `specific`: a higher version that somebody left is not served instead.
# TF32 keeps 3 digits of 7, and the CUDA provider takes it unless told: logits would leave the parity gate's 1e-4. On a GPU,
# servers of before mid-2024 refuse the accelerator "cuda" by name; there the block has to go.
# The warm-up starts CUDA and cuDNN before the first client waits for them; with one image, which fits wherever the model does.
_CONFIG = """\
{mark}{version}: mura-dist export --triton. The next export writes it anew.
# {terms}
name: "{name}"
backend: "onnxruntime"
platform: "onnxruntime_onnx"
default_model_filename: "model.onnx"
version_policy {{ specific {{ versions: [ 1 ] }} }}
max_batch_size: {max_batch}
input [ {{ name: "image" {image} }} ]
output [
  {{ name: "logit" {logit} }},
  {{ name: "activation_map" {activation_map} }}
]
dynamic_batching {{ max_queue_delay_microseconds: 2000 }}
optimization {{
  execution_accelerators {{
    gpu_execution_accelerator [ {{ name: "cuda" parameters {{ key: "use_tf32" value: "0" }} }} ]
  }}
}}
model_warmup [
  {{
    name: "one image"
    batch_size: 1
    inputs {{ key: "image" value {{ {image} zero_data: true }} }}
  }}
]
parameters {{ key: "{key}" value {{ string_value: "{card}" }} }}
"""
