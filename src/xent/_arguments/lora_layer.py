"""The LoRA layers of PEFT, recognised without importing it: where nothing has, there is no such layer.

    layer(x) = base_layer(x) + scaling · lora_B(lora_A(dropout(x)))

A layer is known where its class is `peft.tuners.lora.layer.Linear` itself, and what it does beside this
formula (dropout, DoRA and the other variants, several adapters at once) is an error that names it. The copy
of a layer that PEFT trains in its place (``modules_to_save``) is that copy.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def is_lora(layer: nn.Module) -> bool:
    """Return whether a layer is PEFT's linear layer with LoRA adapters, and its forward is that class's."""
    module = sys.modules.get("peft.tuners.lora.layer")
    if module is None or type(layer) is not module.Linear or "forward" in layer.__dict__:
        return False
    return bool(module.Linear.forward.__module__ == module.__name__)


def saved_copy(layer: Any) -> nn.Module | None:
    """Return the layer that PEFT's ``modules_to_save`` calls; None of any other layer."""
    module = sys.modules.get("peft.utils.other")
    if module is None or type(layer) is not module.ModulesToSaveWrapper or "forward" in layer.__dict__:
        return None
    active = layer.active_adapters
    known = layer.modules_to_save
    if layer.disable_adapters or not active or any(name not in known for name in active):
        original: nn.Module = layer.original_module
        return original
    copy: nn.Module = known[active[0]]
    return copy


def active_adapter(layer: Any, name: str, way_out: str) -> str | None:
    """Return the one adapter that a call adds, None where it adds none; raise a TypeError for anything more.

    name: of the layer, in messages.
    """
    if layer.disable_adapters:
        if layer.merged:
            raise TypeError(f"{name} has merged adapters that are disabled: call {name}.unmerge(), {way_out}")
        return None
    if layer.merged:
        return None
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if len(active) > 1:
        raise TypeError(
            f"{name} has several active adapters, {', '.join(active)}: activate one, or merge them into the "
            f"weight with {name}.merge(), {way_out}"
        )
    if not active:
        return None
    (adapter,) = active
    variant = layer.lora_variant.get(adapter)
    if variant is not None:
        raise TypeError(
            f"{name} has an adapter of the variant {_name_of(variant)}, which is no x Wᵀ + κ B (A x): merge "
            f"it into the weight with {name}.merge(), {way_out}"
        )
    dropout = layer.lora_dropout[adapter]
    if not isinstance(dropout, nn.Identity) and (getattr(dropout, "p", 1.0) > 0 and dropout.training):
        raise TypeError(
            f"{name} has an adapter with dropout, which the loss, reading its factors, would leave out: "
            f"set lora_dropout=0, {way_out}"
        )
    return adapter


def _name_of(variant: object) -> str:
    kind = variant if isinstance(variant, type) else type(variant)
    return kind.__name__
