"""``mixft.nn.MLP``: the feed-forward block of a transformer, its two layers differentiated as one."""

import torch
from torch import Tensor, nn

from mixft.ops import mlp
from mixft.ops.activation import check_activation

from .hooks import has_hooks, has_own_forward
from .linear import Linear, check_input, in_autocast_dtype


class MLP(nn.Module):
    """``fc2(activation(fc1(input))) + residual``, each sum in FP32 and rounded once.

    The backward pass multiplies by the activation's slope inside the product that makes its gradient, and takes the
    first bias's gradient from the same pass (``mixft.ops.mlp``). Under ``torch.autocast`` it computes in autocast's
    dtype. A layer that was replaced, as by :func:`mixft.quantize_` or an adapter, one with hooks, as a precision policy
    attaches them, and one with ``fuse_wgrad_accumulation`` is called, and the block differentiated layer by layer.

    Args:
        in_features: size of the last dimension of the input.
        hidden_features: size between the layers.
        out_features: size of the last dimension of the output; ``in_features`` when not given.
        bias: whether the layers have a learned bias.
        activation: ``"relu"``, ``"gelu"`` (the erf form), ``"gelu_tanh"`` or ``"silu"``.
        device: device of the parameters.
        dtype: dtype of the parameters: FP16, BF16 or FP32.

    Attributes:
        fc1: ``mixft.nn.Linear`` [in_features, hidden_features], with the activation.
        fc2: ``mixft.nn.Linear`` [hidden_features, out_features].

    Raises:
        ValueError: no or an unknown activation, or an input whose last dimension is not ``in_features``.
        TypeError: an input whose dtype is not the weights'.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        bias: bool = True,
        activation: str = "gelu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if check_activation(activation) == "none":
            raise ValueError("activation is None; two layers without one are a single Linear")
        self.fc1 = Linear(in_features, hidden_features, bias, activation, device, dtype)
        self.fc2 = Linear(
            hidden_features, in_features if out_features is None else out_features, bias, None, device, dtype
        )

    @classmethod
    def from_linears(cls, fc1: nn.Linear, fc2: nn.Linear, activation: str = "gelu") -> "MLP":
        """A block that shares the parameters of two layers: training one trains the other.

        Raises:
            TypeError: ``fc1`` or ``fc2`` is not a ``torch.nn.Linear``.
            ValueError: no or an unknown activation, an ``fc1`` with another one or an ``fc2`` with any, or layers that
                do not fit each other.
        """
        layers = Linear.from_linear(fc1, activation), Linear.from_linear(fc2)
        if layers[1].activation is not None:
            raise ValueError(f"fc2 has activation={layers[1].activation!r}; nothing activates the block's output")
        if fc1.out_features != fc2.in_features:
            raise ValueError(
                f"fc1 gives {fc1.out_features} features and fc2 takes {fc2.in_features}; they must be equal"
            )
        block = cls(fc1.in_features, fc1.out_features, fc2.out_features, activation=activation, device="meta")
        block.fc1, block.fc2 = layers
        return block.train(fc1.training)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """The block's output, and ``residual`` [..., out_features] added to it, if given; FP32 if that is."""
        fc1, fc2 = self.fc1, self.fc2
        if not (_is_bare(fc1) and _is_bare(fc2)):
            out = fc2(fc1(input))
            return out if residual is None else out + residual
        input, *parameters = in_autocast_dtype(input, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        check_input(input, parameters[0])
        return mlp(input, *parameters, fc1.activation, residual=residual)


def _is_bare(layer: nn.Module) -> bool:
    """Whether ``layer`` does nothing but multiply by its weight, add its bias and activate."""
    return type(layer) is Linear and not (layer.fuse_wgrad_accumulation or has_hooks(layer) or has_own_forward(layer))
