"""Models with random weights in the shapes of BERT-base and Llama, scaled down for a CPU."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mixft.benchmarks.peers import quiet

Inputs = tuple[nn.Module, dict[str, Tensor]]


@dataclass(frozen=True)
class Shape:
    """A model and a batch.

    Attributes:
        kind: "bert" for a classifier, "llama" for a language model.
        hidden: width.
        layers: how many.
        heads: attention heads.
        key_heads: heads of keys and values.
        intermediate: width within a feed-forward block.
        vocabulary: tokens that there are.
        batch: sequences.
        length: tokens a sequence.
        devices: types of the devices that it is large enough, and small enough, for.
    """

    kind: str
    hidden: int
    layers: int
    heads: int
    key_heads: int
    intermediate: int
    vocabulary: int
    batch: int
    length: int
    devices: tuple[str, ...] = ("cuda",)

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def linear_parameters(self) -> int:
        """Weights that every token is multiplied by."""
        keys = self.hidden * self.key_heads // self.heads
        projections = 3 if self.kind == "llama" else 2
        layer = 2 * self.hidden * (self.hidden + keys) + projections * self.hidden * self.intermediate
        return self.layers * layer + (self.hidden * self.vocabulary if self.kind == "llama" else 0)

    @property
    def parameters(self) -> int:
        """The weights, with those of the embeddings."""
        return self.linear_parameters + self.hidden * self.vocabulary

    @property
    def operations(self) -> int:
        """Multiplications and additions of a forward pass, attention's two products included."""
        return self.tokens * (2 * self.linear_parameters + 4 * self.layers * self.length * self.hidden)

    def inputs(self, labels: bool) -> Callable[[torch.device], Inputs]:
        """Makes the model in FP32 and a batch, without dropout and, for Llama, without a cache."""

        def make(device: torch.device) -> Inputs:
            model = _BUILDERS[self.kind](self).eval().to(device)
            batch = {"input_ids": torch.randint(self.vocabulary, (self.batch, self.length)).to(device)}
            if labels:
                classes = torch.arange(self.batch, device=device) % 2
                batch["labels"] = classes if self.kind == "bert" else batch["input_ids"]
            return model, batch

        return make


def _bert(shape: Shape) -> nn.Module:
    with quiet():  # it imports the packages that it can use
        from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def _llama(shape: Shape) -> nn.Module:
    with quiet():  # it imports the packages that it can use
        from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


_BUILDERS = {"bert": _bert, "llama": _llama}


def replace_linear(model: nn.Module, convert: Callable[[nn.Linear], nn.Module], head: bool = False) -> nn.Module:
    """A copy of ``model`` with ``convert(layer)`` for its linear layers; with ``head``, for those of its head too."""
    model = copy.deepcopy(model)
    for parent_name, parent in list(model.named_modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and (head or parent_name):
                setattr(parent, name, convert(child))
    return model


def memory_held(model: nn.Module) -> dict[str, int]:
    """Bytes of parameters and buffers, and of the gradients that are kept."""
    parameters = list(model.parameters())
    gradients = sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
    weights = sum(tensor.nbytes for tensor in (*parameters, *model.buffers()))
    return {"parameters": weights} | ({"gradients": gradients} if gradients else {})


def one_token(shape: Shape) -> Shape:
    """The shape of a step that decodes one token of one sequence."""
    return replace(shape, batch=1, length=1)


BERT_BASE = Shape("bert", 768, 12, 12, 12, 3072, 30522, batch=32, length=128)
BERT_SMALL = replace(BERT_BASE, layers=2, vocabulary=4096, batch=4, length=64, devices=("cpu",))
LLAMA = Shape("llama", 2048, 8, 32, 4, 5632, 32000, batch=4, length=512)
LLAMA_SMALL = replace(
    LLAMA, hidden=512, layers=2, heads=8, intermediate=1408, vocabulary=4096, batch=2, length=64, devices=("cpu",)
)
