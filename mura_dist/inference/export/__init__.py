"""Export of checkpoints as ONNX files: fp32, fp16, bf16 and int8, and a Triton model repository."""
