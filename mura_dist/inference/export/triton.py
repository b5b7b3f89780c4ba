"""An exported model as a model repository for an NVIDIA Triton server.

    model.onnx -> DIR/mura_dist/1/model.onnx, then DIR/mura_dist/config.pbtxt (written last)

A client sends one or more images (1, S, S) uint8 and receives a logit (1) and an activation map (h, w) for each. The server
batches requests. The client never sees the file. The configuration's parameters hold the card without metrics and recipe, and the
server returns them at /v2/models/mura_dist/config.
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

NAME = "mura_dist"  # of the model and its folder
MAX_BATCH = 64  # the largest batch that the parity gate compares
_MARK = "# Written by mura-dist "
_TYPES = {
    onnx.TensorProto.UINT8: "TYPE_UINT8",
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
}


def check(repository: Path) -> None:
    """Raise UserError if the model cannot be written to `repository`."""
    folder = repository / NAME
    files.check_folder(folder / "1", "--triton")
    config = folder / "config.pbtxt"
    if config.exists() and not (config.is_file() and config.read_bytes().startswith(_MARK.encode())):
        raise UserError(
            f"--triton {repository}: {config} was not written by mura-dist, so another model has that name. Give another folder, "
            f"or move {folder} away."
        )


def list_files(repository: Path) -> dict[str, Path]:
    """Return the files that `write` writes, by their names for a stamp."""
    folder = repository / NAME
    return {"triton model": folder / "1" / "model.onnx", "triton configuration": folder / "config.pbtxt"}


def write(repository: Path, data: bytes) -> None:
    """Write the ONNX file `data` to the repository in place of an earlier export. Other models stay.

    After a crash there may be a model without a configuration, whose shapes Triton derives itself. There is never a model with
    the configuration of another.
    """
    check(repository)
    model_file, config_file = list_files(repository).values()
    config_file.unlink(missing_ok=True)
    files.write_bytes(model_file, data)
    files.write_text(config_file, config(data))


def config(data: bytes) -> str:
    """Return the config.pbtxt of the ONNX file `data`: Triton's ModelConfig in protobuf's text format."""
    model = onnx.load_from_string(data)
    card = Card.parse({entry.key: entry.value for entry in model.metadata_props}.get(KEY), "the exported model")
    tensors = {value.name: _tensor(value.type.tensor_type) for value in (*model.graph.input, *model.graph.output)}
    parameters = card.model_dump(exclude={"metrics", "recipe"}) | {"model_sha256": hashlib.sha256(data).hexdigest()}
    return _CONFIG.format(
        mark=_MARK,
        version=__version__,
        terms=" ".join(card.terms.split()),
        name=NAME,
        max_batch=MAX_BATCH,
        key=KEY,
        card=json.dumps(parameters).replace("\\", "\\\\").replace('"', '\\"'),
        **tensors,
    )


def _tensor(kind: Any) -> str:
    """Return type and dimensions of an input or output without the batch dimension, which Triton adds."""
    dims = [dim.dim_value for dim in kind.shape.dim[1:]]
    # An output needs a dimension: the client receives (N, 1) for the model's (N,).
    shape = f"dims: [ {', '.join(map(str, dims))} ]" if dims else "dims: [ 1 ] reshape { shape: [ ] }"
    return f"data_type: {_TYPES[kind.elem_type]} {shape}"


# instance_group and preferred_batch_size are missing: the server's defaults (one instance per GPU, or two on the CPU; any batch
# size) suit every machine. `specific` keeps the server from serving a leftover higher version.
# TF32 keeps 3 of 7 digits, so that logits would exceed the parity gate's 1e-4. The CUDA provider uses it by default. Servers from
# before mid-2024 refuse the accelerator "cuda" by name: delete the block for them.
# The warm-up initializes CUDA and cuDNN before the first request, with one image, which fits wherever the model does.
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
