"""Store all parameters of a model as one vector, and their gradients as another.

    model's 508 parameters (DenseNet-169)  =  views into weights (n,)
    their .grad                            =  views into gradient (n,)

So one all-reduce, one norm and one optimizer kernel replace 508. The views keep their shapes. A convolution's weight may be in
channels-last order. Each view starts at a multiple of 64 bytes for vectorized kernels. The gaps are zeros with zero gradients.
"""

import torch
from torch import Tensor, nn

_ALIGNMENT = 16  # float32 numbers


class FlatParameters:
    """The parameters of a model as one vector.

    Attributes:
        weights: (n,) float32, the one parameter of the optimizer.
        gradient: (n,) float32, its gradient.
    """

    def __init__(self, model: nn.Module, *, channels_last: bool) -> None:
        self._parameters = list(model.parameters())
        self._channels_last = channels_last
        self._starts, end = [], 0
        for parameter in self._parameters:
            self._starts.append(end)
            end += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
        device = self._parameters[0].device
        initial = [parameter.detach().clone() for parameter in self._parameters]
        self.weights = nn.Parameter(torch.zeros(end, device=device))
        self.gradient = torch.zeros(end, device=device)
        self._attached_to = 0
        self.attach()
        with torch.no_grad():
            for parameter, value in zip(self._parameters, initial, strict=True):
                parameter.copy_(value)

    def attach(self) -> None:
        """Make the model's parameters views of the vectors, again if `weights` moved in memory as under DeepSpeed's ZeRO."""
        self.weights.grad = self.gradient  # DeepSpeed drops it after each step
        if self.weights.data_ptr() == self._attached_to:  # 1,016 views take 6 to 12 ms, while a GPU is idle
            return
        self._attached_to = self.weights.data_ptr()
        weights, gradients = (self.views(vector) for vector in (self.weights.data, self.gradient))
        for parameter, weight, gradient in zip(self._parameters, weights, gradients, strict=True):
            parameter.data, parameter.grad = weight, gradient

    def views(self, vector: Tensor) -> list[Tensor]:
        """Return views of a vector (n,) in the shapes of the parameters, in order."""
        return [
            self._shaped(vector[start : start + parameter.numel()], parameter)
            for start, parameter in zip(self._starts, self._parameters, strict=True)
        ]

    def _shaped(self, piece: Tensor, like: Tensor) -> Tensor:
        if self._channels_last and like.ndim == 4:
            out, channels, height, width = like.shape
            return piece.view(out, height, width, channels).permute(0, 3, 1, 2)
        return piece.view(like.shape)
