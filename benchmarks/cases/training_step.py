"""A whole training step: forward, backward, clipping and optimizer, of whole models, in mixft's recipes and others'."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import mixft
from mixft.benchmarks.case import Call, Case, Provider, Refused
from mixft.benchmarks.peers import peer

from .models import BERT_BASE, BERT_SMALL, LLAMA, LLAMA_SMALL, Inputs, Shape, memory_held, replace_linear
from .optimizer_peers import state_bytes

OPTIONS = {"lr": 1e-3, "weight_decay": 0.01}
MAX_NORM = 1.0
LOSS_SCALE = 2.0**10
# The losses of so many steps are compared: the later ones show what backward and optimizer did.
CHECKED_STEPS = 3


@dataclass
class Recipe:
    """A model and what trains it.

    Attributes:
        model: converted for the recipe.
        optimizer: over its parameters.
        autocast: dtype of the forward pass; None for none.
        scaler: of the loss; None for none.
        clips: whether the optimizer clips inside its step.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    autocast: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None
    clips: bool = False

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        """One step; the loss before it."""
        device = batch["input_ids"].device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            loss = self.model(**batch).loss
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if not self.clips:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach()


MakeRecipe = Callable[[nn.Module], Recipe]


def training_step(shape: Shape, precision: str, **options) -> Case:
    """mixft's recipe ``precision``, "int8", "bf16" or "fp16", against plain torch, torch's AMP and other packages."""
    recipes = {"mixft": {"int8": _int8, "bf16": _bf16, "fp16": _fp16}[precision], **PEERS}
    if shape.kind == "llama":
        recipes["liger-kernel"] = _liger
    return step_case("training_step", shape, precision, recipes, exact=_plain, memory=True, **options)


def loss_scaling(shape: Shape) -> Case:
    """What scaling the loss costs: the FP16 step with mixft's scaler, with torch's and with none."""
    recipes = {"mixft": _fp16, "torch GradScaler": _fp16_torch_scaler, "no scaler": _fp16_unscaled}
    reason = "no scaler checks nothing and counts nothing"
    return step_case("loss_scaling", shape, "fp16", recipes, exact=_plain, reason_if_slower=reason)


def step_case(
    family: str,
    shape: Shape,
    precision: str,
    recipes: dict[str, MakeRecipe],
    *,
    exact: MakeRecipe,
    trains_all: bool = True,
    **options,
) -> Case:
    """The steps of ``recipes``, the first of them mixft's, whose losses are held to those of ``exact`` in FP64.

    Args:
        precision: of mixft's products.
        trains_all: False where the weights are frozen under adapters, whose own work is next to nothing.
        options: of Case.
    """
    # Every weight read in the forward and in the backward, and the optimizer's step.
    traffic = shape.parameters * (2 * 4 + 32) if trains_all else 2 * shape.linear_parameters
    return Case(
        f"{family}/{shape.kind}-{shape.layers}-layers-{precision}",
        inputs=shape.inputs(labels=True),
        exact=lambda inputs: _provider(exact)((copy.deepcopy(inputs[0]).double(), inputs[1])).checked_result(),
        providers={name: _provider(recipe) for name, recipe in recipes.items()},
        # Of the loss. Two updates lower it by more than that.
        bound=0.05,
        bytes=traffic,
        # Of a frozen weight there is no gradient.
        operations=(3 if trains_all else 2) * shape.operations,
        rate=precision,
        tokens=shape.tokens,
        devices=shape.devices,
        **options,
    )


def _provider(recipe: MakeRecipe) -> Provider:
    def prepare(inputs: Inputs) -> Call:
        model, batch = inputs
        trainer = recipe(copy.deepcopy(model).train())
        return Call(
            lambda: trainer.step(batch),
            result=lambda first: [torch.stack([first, *(trainer.step(batch) for _ in range(CHECKED_STEPS - 1))])],
            held=lambda: memory_held(trainer.model) | state_bytes(trainer.optimizer),
        )

    return prepare


def _plain(model: nn.Module) -> Recipe:
    return Recipe(model, torch.optim.AdamW(model.parameters(), fused=True, **OPTIONS))


def _amp(model: nn.Module, make=torch.optim.AdamW, **options) -> Recipe:
    """Autocast to FP16 under a scaler on a GPU, to BF16 on a CPU."""
    on_gpu = next(model.parameters()).is_cuda
    options = options or ({"fused": True} if make is torch.optim.AdamW else {})
    return Recipe(
        model,
        make(model.parameters(), **OPTIONS, **options),
        autocast=torch.float16 if on_gpu else torch.bfloat16,
        scaler=torch.amp.GradScaler("cuda", init_scale=LOSS_SCALE) if on_gpu else None,
    )


def _compiled_amp(model: nn.Module) -> Recipe:
    model.compile(dynamic=False)
    return _amp(model)


def _bitsandbytes(model: nn.Module) -> Recipe:
    return _amp(model, peer("bitsandbytes", "optim").AdamW8bit)


def _torchao(model: nn.Module) -> Recipe:
    training = peer("torchao", "prototype.quantized_training")
    peer("torchao", "quantization").quantize_(model, training.Int8MixedPrecisionTrainingConfig())
    model.compile(dynamic=False)
    return Recipe(model, torch.optim.AdamW(model.parameters(), fused=True, **OPTIONS), autocast=torch.bfloat16)


def _liger(model: nn.Module) -> Recipe:
    patch = peer("liger-kernel", "transformers.monkey_patch")
    if not next(model.parameters()).is_cuda:
        raise Refused("its kernels are for GPUs")
    # Without its rotary embedding, which would replace that of every other provider's model too.
    patch._apply_liger_kernel_to_instance(model=model, rope=False)
    return _amp(model)


def _int8(model: nn.Module) -> Recipe:
    on_gpu = next(model.parameters()).is_cuda
    # The output head too, as torchao quantizes it.
    mixft.quantize_(model, mode="train", include="*")
    optimizer = mixft.optim.AdamW(model.parameters(), max_grad_norm=MAX_NORM, **OPTIONS)
    return Recipe(model, optimizer, autocast=torch.bfloat16 if on_gpu else None, clips=True)


def _bf16(model: nn.Module) -> Recipe:
    parameters = model.bfloat16().parameters()
    optimizer = mixft.optim.AdamW(parameters, max_grad_norm=MAX_NORM, master_weights="split", **OPTIONS)
    return Recipe(model, optimizer, clips=True)


def _fp16(model: nn.Module) -> Recipe:
    device = next(model.parameters()).device.type
    model = replace_linear(model.half(), mixft.nn.Linear.from_linear, head=True)
    optimizer = mixft.optim.AdamW(model.parameters(), max_grad_norm=MAX_NORM, **OPTIONS)
    return Recipe(model, optimizer, scaler=mixft.amp.LossScaler(LOSS_SCALE, device=device), clips=True)


def _fp16_unscaled(model: nn.Module) -> Recipe:
    return replace(_fp16(model), scaler=None)


def _fp16_torch_scaler(model: nn.Module) -> Recipe:
    recipe = _fp16(model)
    return replace(recipe, scaler=torch.amp.GradScaler(next(model.parameters()).device.type, init_scale=LOSS_SCALE))


PEERS = {
    "torch": _plain,
    "torch AMP": _amp,
    "torch.compile": _compiled_amp,
    "bitsandbytes": _bitsandbytes,
    "torchao+compile": _torchao,
}

SMALL_PRODUCTS = "products of this width gain less by int8 than by BF16, whose operands need no quantization"
THROUGH_FP32 = "a CPU multiplies FP16 through FP32, and BF16, where it has the instructions, two to four times faster"

CASES = (
    training_step(BERT_SMALL, "int8"),
    training_step(LLAMA_SMALL, "int8", reason_if_slower=SMALL_PRODUCTS),
    training_step(BERT_SMALL, "bf16"),
    training_step(LLAMA_SMALL, "bf16"),
    training_step(BERT_SMALL, "fp16", reason_if_slower=THROUGH_FP32),
    training_step(LLAMA_SMALL, "fp16", reason_if_slower=THROUGH_FP32),
    loss_scaling(BERT_SMALL),
    loss_scaling(BERT_BASE),
    *(training_step(shape, precision) for shape in (BERT_BASE, LLAMA) for precision in ("int8", "bf16", "fp16")),
)
