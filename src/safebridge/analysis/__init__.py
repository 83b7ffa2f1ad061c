"""Why and where a model's safety works or fails: measurements on its hidden states."""

from importlib import import_module
from typing import Any

_HOMES = {
    "ActivationReport": "activation_layers",
    "LayerCurve": "curves",
    "ModalityGap": "modality_gap",
    "PromptStates": "states",
    "SafetyRange": "safety_layers",
    "bypass_layers": "activation_layers",
    "capture_states": "states",
    "choose_alpha": "scaling",
    "find_refusal_tokens": "activation_layers",
    "find_safety_range": "safety_layers",
    "measure_activation_layers": "activation_layers",
    "measure_activation_shift": "safety_layers",
    "measure_angular_gap": "safety_layers",
    "measure_bypass": "activation_layers",
    "measure_modality_gap": "modality_gap",
    "measure_modality_shift": "modality_shift",
    "measure_pair_angles": "safety_layers",
    "measure_probe_map": "probe_maps",
    "measure_replacement": "activation_layers",
    "measure_shift_difference": "safety_layers",
    "measure_spelled": "spelled_pictures",
    "project_states": "projection",
    "refine_range": "scaling",
    "render_words": "typography",
    "replace_image_states": "activation_layers",
    "scaled_layers": "scaling",
    "spell_image_tokens": "spelled_pictures",
}

__all__ = [
    "ActivationReport",
    "LayerCurve",
    "ModalityGap",
    "PromptStates",
    "SafetyRange",
    "bypass_layers",
    "capture_states",
    "choose_alpha",
    "find_refusal_tokens",
    "find_safety_range",
    "measure_activation_layers",
    "measure_activation_shift",
    "measure_angular_gap",
    "measure_bypass",
    "measure_modality_gap",
    "measure_modality_shift",
    "measure_pair_angles",
    "measure_probe_map",
    "measure_replacement",
    "measure_shift_difference",
    "measure_spelled",
    "project_states",
    "refine_range",
    "render_words",
    "replace_image_states",
    "scaled_layers",
    "spell_image_tokens",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"safebridge.analysis.{_HOMES[name]}"), name)
