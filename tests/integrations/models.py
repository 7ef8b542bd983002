"""Tiny causal language models of Transformers, with weights at random."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

CLASSES = 97
SIZES: dict[str, Any] = {
    "vocab_size": CLASSES,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # so that logits are not all near 0
}
GROUPED = {**SIZES, "num_key_value_heads": 1}


def gpt2(**options: Any) -> nn.Module:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": CLASSES, "initializer_range": 0.3}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, **options)
    )


def llama(**options: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, **options))


def gemma2(**options: Any) -> nn.Module:
    options = {"final_logit_softcapping": 2.0, **options}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**{**GROUPED, **options}, head_dim=8))


def cohere(**options: Any) -> nn.Module:
    return transformers.CohereForCausalLM(transformers.CohereConfig(**GROUPED, logit_scale=0.25, **options))


def granite(**options: Any) -> nn.Module:
    return transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**GROUPED, logits_scaling=4.0, **options)
    )


def phi(**options: Any) -> nn.Module:
    """A head with a bias."""
    return transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES, **options))


def peft(base: Callable[..., nn.Module] = llama, **options: Any) -> nn.Module:
    """An adapter on the head, and one below it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        **{"r": 2, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False, **options}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(base(), config)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "GPT-2": gpt2,
    "Llama": llama,
    "Gemma-2": gemma2,
    "Cohere": cohere,
    "Granite": granite,
    "Phi": phi,
    "PEFT": peft,
}


def made(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name](**options)


def batch(rows: int = 3, tokens: int = 9) -> tuple[Tensor, Tensor]:
    """Token ids and labels, some of which are ignored."""
    ids = torch.randint(3, CLASSES, (rows, tokens), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = -100
    labels[-1, -2:] = -100
    return ids, labels


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
