"""What reports say of a plan's weights."""

from __future__ import annotations

from placement.plan import Plan


def formats_in_words(plan: Plan) -> str:
    """What a plan's model is, and in which formats its weights are."""
    routed = f"experts in {plan.format}, other linear layers" if plan.expert_count else "a dense model, linear layers"
    return f"{plan.model_type}, {routed} in {plan.dense_format}, output layer in {plan.head_format}"


def dense_in_words(plan: Plan, layers: int) -> str:
    """Where the dense weights of a plan's layers are, of which there are so many."""
    vram = plan.vram
    if vram is None or not (vram.dense_layers or vram.window_layers):
        return f"all {layers} layers in RAM"
    here = len(vram.dense_layers)
    if vram.window_layers:
        return (
            f"{here} of {layers} layers in VRAM for good; the others stream through a window of {vram.window_layers} "
            "there in every pass"
        )
    return f"{here} of {layers} layers in VRAM" + ("" if here == layers else ", the others in RAM")
