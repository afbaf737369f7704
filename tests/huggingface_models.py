"""Small models of transformers with random weights, with layers large enough to be quantized."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

VOCABULARY = 150


def bert(layers: int = 2, **options) -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=32,
            **options,
        )
    ).eval()


def llama(layers: int = 2, **options) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=True,
            **options,
        )
    ).eval()


def gpt2(layers: int = 2, **options) -> GPT2LMHeadModel:
    """Its layers are Conv1D, with weights [in_features, out_features], two of them square."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=128, n_inner=192, n_layer=layers, n_head=2, n_positions=32, **options
    )
    return GPT2LMHeadModel(config).eval()


MODELS = {"bert": bert, "llama": llama, "gpt2": gpt2}


def logits(model: PreTrainedModel, rows: int = 3, length: int = 17) -> torch.Tensor:
    """Its output for the same tokens whichever the model."""
    tokens = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model(tokens.to(model.device)).logits
