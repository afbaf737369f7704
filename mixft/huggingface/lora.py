"""PEFT's LoRA on ``QuantLinear``: adapters in floating point beside a frozen int8 weight.

    y = QuantLinear(x) + scaling B A x            A [rank, in_features], B [out_features, rank]

(Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021.) PEFT asks its table of tuners which class serves
a ``LoraConfig``; importing this module puts :class:`Int8LoraModel` there, so that ``get_peft_model``,
``PeftModel.from_pretrained`` and ``model.add_adapter`` take int8 layers with unchanged code.
"""

import warnings

import peft
import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import Linear, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_adapters_to_merge
from torch import Tensor, nn

from mixft.nn import Linear as MixftLinear
from mixft.nn import QuantLinear
from mixft.nn.conv1d import is_conv1d
from mixft.nn.hooks import has_hooks
from mixft.nn.int8_weight import int8_weight_of
from mixft.ops.lora_int8_linear import lora_int8_linear

OLDEST_PEFT = (0, 20)

if tuple(map(int, peft.__version__.split(".")[:2])) < OLDEST_PEFT:
    raise ImportError(
        f"mixft.huggingface needs PEFT 0.20 or newer, or none; {peft.__version__} is installed", name="peft"
    )

# The others start from a decomposition of the floating-point weight, and change it.
INITIAL_WEIGHTS = (True, False, "gaussian", "orthogonal", "eva")


class LoraQuantLinear(Linear):
    """A ``QuantLinear`` with LoRA adapters.

    Merging dequantizes the weight, adds the adapters in FP32 and quantizes the sum anew: each element is then within
    half a step, max|row| / 254, of the exact sum. The weight before is kept, and unmerging gives its bits back. After
    ``mixft.dequantize_`` the adapters are those of a floating-point layer, and merging rounds to its dtype alone.

    Raises:
        ValueError: ``use_dora`` or another variant of LoRA, ``lora_bias``, or an ``init_lora_weights`` that changes the
            weight; merging gives NaN or Inf under ``safe_merge``.
    """

    takes_int8_weight = True  # for quantize_, which leaves the layers of other adapters

    def __init__(self, base_layer: QuantLinear, adapter_name: str, config, **options):
        super().__init__(base_layer, adapter_name, config=config, **options)
        self._weight_before_merge: tuple[Tensor, ...] | None = None

    def _get_in_out_features(self, module: QuantLinear) -> tuple[int, int]:
        return module.in_features, module.out_features

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """The layer's output with that of its adapters; a single plain adapter is computed inside the int8 products."""
        adapter = None if args or kwargs else self._single_adapter()
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        layer, a, b = self.get_base_layer(), self.lora_A[adapter].weight, self.lora_B[adapter].weight
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, a, b = x.to(dtype), a.to(dtype), b.to(dtype)
        if not x.dtype == a.dtype == b.dtype:
            return super().forward(x)
        layer.guard.starts_forward(x)
        operands = x, layer.weight, layer.weight_scale, layer.bias
        out = lora_int8_linear(*operands, a, b, self.scaling[adapter], backward=layer.backward)
        layer.watch_gradient(out)
        return out

    def _single_adapter(self) -> str | None:
        """The adapter, if there is one active and nothing but it, dropout included, is to change the layer's output."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        layer = self.base_layer
        if self.disable_adapters or self.merged_adapters or len(names) != 1 or type(layer) is not QuantLinear:
            return None
        a, b, dropout = (parts[names[0]] for parts in (self.lora_A, self.lora_B, self.lora_dropout))
        plain = layer.mode == "dynamic" and layer.outlier_threshold is None and type(a) is type(b) is nn.Linear
        dropped = self.training and not isinstance(dropout, nn.Identity)
        hooked = any(map(has_hooks, (layer, a, b)))
        return None if dropped or hooked or not plain or names[0] in self.lora_variant else names[0]

    @property
    def lora_variants(self) -> dict:
        """Plain LoRA alone: the variants read the floating-point weight."""
        return {(): None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config, **options) -> None:
        """Add an adapter; the class says what is refused."""
        if config.lora_bias:
            raise ValueError("lora_bias=True is not for int8 layers; train their biases with bias='lora_only'")
        if config.use_dora:
            raise ValueError("use_dora=True is not for int8 layers, as it reads a floating-point weight; leave it out")
        if config.init_lora_weights not in INITIAL_WEIGHTS:
            choices = ", ".join(map(repr, INITIAL_WEIGHTS))
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} changes the int8 weight; use one of {choices}"
            )
        super().update_layer(adapter_name, r, lora_alpha, config=config, **options)

    def orthogonal_init(self, adapter_name: str) -> None:
        """PEFT's, in the dtype that the adapter has: PEFT takes that of the layer's weight, which may be int8."""
        self.get_base_layer = lambda: self.lora_A[adapter_name]
        try:
            super().orthogonal_init(adapter_name)
        finally:
            del self.get_base_layer

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the weight; see the class for the error that this makes.

        Args:
            safe_merge: refuse a result with NaN or Inf, and leave the weight as it was.
            adapter_names: the adapters; None for the active ones.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        layer = self.get_base_layer()
        before = self._weight_before_merge or _weight_of(layer)
        # Every merged adapter is added to the weight before the first, so that their number adds no rounding.
        merged = _in_floats(before)
        for name in [*self.merged_adapters, *names]:
            merged += self.get_delta_weight(name)
        if safe_merge and not merged.isfinite().all():
            raise ValueError(f"merging {', '.join(names)} gives NaN or Inf; the adapter seems to be broken")
        _set_weight(layer, (merged,))
        self._weight_before_merge = before
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Take every merged adapter out again, to the bits of the weight before."""
        if self._weight_before_merge is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        _set_weight(self.get_base_layer(), self._weight_before_merge)
        self._weight_before_merge = None
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``scaling B A`` [out_features, in_features] in FP32, also where the layer stands in for a ``Conv1D``."""
        a, b = self.lora_A[adapter].weight.float(), self.lora_B[adapter].weight.float()
        return b @ a * self.scaling[adapter]


class Int8LoraModel(LoraModel):
    """PEFT's ``LoraModel``, which also takes ``QuantLinear`` layers, and counts them in ``"all-linear"``.

    Raises:
        ValueError: a layer of mixft with a fused activation, which an adapter would have to come before.
    """

    @staticmethod
    def _create_new_module(lora_config, adapter_name: str, target: nn.Module, **options) -> nn.Module:
        _refuse_activation(target)
        lora_config._register_custom_module({QuantLinear: LoraQuantLinear})
        return LoraModel._create_new_module(lora_config, adapter_name, target, **options)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *arguments, **options) -> None:
        """Put the adapters of ``adapter_name`` into ``model``, as PEFT does."""
        config = self.peft_config[adapter_name]
        if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
            _maybe_include_all_linear_layers(config, model)
            config.target_modules |= _int8_layers(model)
        super().inject_adapter(model, adapter_name, *arguments, **options)


def _refuse_activation(target: nn.Module) -> None:
    """Raise ValueError for a layer whose activation an adapter, added to its output, would come after."""
    layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(layer, (QuantLinear, MixftLinear)) and layer.activation is not None:
        raise ValueError(
            f"a {type(layer).__name__} with activation={layer.activation!r} takes no adapter; use one without, and the "
            "activation after it"
        )


def _int8_layers(model: nn.Module) -> set[str]:
    """The names of the layers of ``model`` that no adapter holds yet."""
    held = {id(part) for module in model.modules() if isinstance(module, BaseTunerLayer) for part in module.children()}
    return {name for name, part in model.named_modules() if isinstance(part, QuantLinear) and id(part) not in held}


def _keeps_int8(layer: nn.Module) -> bool:
    return isinstance(layer, QuantLinear) and layer.mode != "train"


def _matrix(layer: nn.Module) -> Tensor:
    """The floating-point weight as [out_features, in_features]."""
    transposed = layer.transposed if isinstance(layer, QuantLinear) else is_conv1d(layer)
    return layer.weight.t() if transposed else layer.weight


def _weight_of(layer: nn.Module) -> tuple[Tensor, ...]:
    """The weight in what it is kept in, [out_features, in_features]: int8 and its scales, or one floating tensor."""
    return (layer.weight, layer.weight_scale) if _keeps_int8(layer) else (_matrix(layer).detach().clone(),)


def _in_floats(weight: tuple[Tensor, ...]) -> Tensor:
    """A new FP32 tensor of the weight's values."""
    return weight[0].to(torch.float32, copy=True) if len(weight) == 1 else weight[0] * weight[1]


@torch.no_grad()
def _set_weight(layer: nn.Module, weight: tuple[Tensor, ...]) -> None:
    """Set what `_weight_of` gave, also where the layer was quantized or dequantized since."""
    if not _keeps_int8(layer):
        _matrix(layer).copy_(weight[0] if len(weight) == 1 else _in_floats(weight))
        return
    values, scale = weight if len(weight) == 2 else int8_weight_of(weight[0])
    device = layer.weight.device
    layer.weight, layer.weight_scale = values.to(device), scale.to(device)
    if layer.mode == "static":
        layer.weight_sum = layer.weight.sum(1, dtype=torch.int32)


PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = Int8LoraModel
