"""Rotary positions: what is rotated in each layer, by which frequencies, and their form in config.json.

transformers 5 writes `rope_parameters`, one object or one for each kind of layer; 4 wrote `rope_theta` and
`rope_scaling`. Both are read.
Sources: Su et al. 2021 (arXiv 2104.09864); YaRN, Peng et al. 2023 (arXiv 2309.00071); LongRoPE, Ding et al. 2024
(arXiv 2402.13753).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmkit.errors import UserError
from llmkit.io.foreign import integer, number, shown, switch
from llmkit.io.progress import counted

if TYPE_CHECKING:
    from llmkit.model.families import Family

LEAST_TURNS = 1e-6  # of yarn's; a context divided by much less overflows


@dataclass(frozen=True)
class RopeScaling:
    """Scaled rotary frequencies: "linear" divides all by `factor`, "llama3" and "yarn" those of long wavelengths,
    "longrope" each by its own `short_factor`, or `long_factor` in a sequence longer than the original context.

    "dynamic" divides only beyond `max_position_embeddings`, which our sequences never exceed: it is kept for readers of
    saved models. `attention_factor` multiplies cosines and sines.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True)
class Rope:
    """Rotation of a layer's queries and keys: of the first `channels` of a head, of all if None, of none if 0."""

    theta: float
    scaling: RopeScaling | None = None
    channels: int | None = None


# Fields of each kind of scaling in config.json, besides its name.
_SCALING_FIELDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate",
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
}  # fmt: skip


def scaling_from_dict(values: dict[str, Any]) -> RopeScaling:
    """Restore a scaling from `dataclasses.asdict`, directly or through JSON."""
    read: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return RopeScaling(**read)


def ropes_from_hf(values: dict[str, Any], family: Family, head_dim: int, where: str) -> dict[str, Any]:
    """Read the fields `rope_theta`, `rope_scaling`, `rotary_dim` and `sliding_rope` of ModelConfig.

    If a file has both `rope_scaling` and `rope_parameters`, the former wins, as in transformers 5.
    """
    if not family.key("rope_theta"):
        return {}
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    parameters = values.get(name) or {}
    if not isinstance(parameters, dict):
        raise UserError(f"{where}: expected an object for {name}, found {shown(parameters)}")
    local: dict[str, Any] = {"rope_theta": values.get("rope_local_base_freq")}
    if any(isinstance(value, dict) for value in parameters.values()):
        if not family.layer_ropes:
            raise UserError(f"{where}: {name} that differ from layer to layer are not supported")
        kinds = [parameters.get(kind) or {} for kind in ("sliding_attention", "full_attention")]
        if not all(isinstance(kind, dict) for kind in kinds):
            raise UserError(f"{where}: expected an object for each kind of layer in {name}, found {shown(parameters)}")
        local |= kinds[0]
        parameters = kinds[1]
    rotary_dim = None
    if family.partial_rotary:
        share = number(parameters, "partial_rotary_factor", where) or number(
            values, "partial_rotary_factor", where, 1.0
        )
        rotary_dim = int(head_dim * share)
        if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
            raise UserError(f"{where}: expected partial_rotary_factor of an even number of channels, found {share:g}")
    theta, scaling = _rope_from_hf(parameters, name, values, rotary_dim or head_dim, where)
    out: dict[str, Any] = {"rope_theta": theta, "rope_scaling": scaling}
    if rotary_dim != head_dim:
        out["rotary_dim"] = rotary_dim
    if family.layer_ropes:
        sliding = Rope(*_rope_from_hf(local, name, values, head_dim, where))
        if sliding != Rope(theta, scaling):
            out["sliding_rope"] = sliding
    return out


def _rope_from_hf(
    parameters: dict[str, Any], name: str, values: dict[str, Any], channels: int, where: str
) -> tuple[float, RopeScaling | None]:
    theta = number(parameters, "rope_theta", where) or number(values, "rope_theta", where, 10000.0)
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if rope_type == "default":
        return theta, None
    if rope_type == "su" or (rope_type == "yarn" and "short_factor" in parameters):  # phi3, before the name existed
        rope_type = "longrope"
    if not isinstance(rope_type, str) or rope_type not in _SCALING_FIELDS:
        known = ", ".join(("default", *_SCALING_FIELDS))
        raise UserError(f"{where}: expected rope scaling {known}, found {shown(rope_type)}")
    needed = _SCALING_FIELDS[rope_type][: 3 if rope_type == "llama3" else 1]
    numbers: dict[str, Any] = {name: number(parameters, name, where) for name in needed}
    if rope_type in ("llama3", "yarn", "longrope"):
        field, context = "original_max_position_embeddings", integer(values, "max_position_embeddings", where, 2048)
        numbers[field] = integer(values, field, where, integer(parameters, field, where, context))  # as transformers
        if rope_type == "yarn" and theta <= 1:
            raise UserError(f"{where}: expected a number above 1 for rope_theta with yarn, found {shown(theta)}")
        if rope_type == "yarn" and numbers["factor"] is None and numbers[field] == context:
            raise UserError(f"{where}: rope scaling yarn needs factor, or {field} other than {context}")
        if rope_type != "llama3":
            factor = numbers["factor"] = numbers["factor"] or context / numbers[field]
            if rope_type == "yarn":
                numbers |= _yarn_from_hf(parameters, factor, where)
            else:
                numbers |= _longrope_from_hf(parameters, factor, numbers[field], channels, where)
    missing = [name for name, value in numbers.items() if value is None]
    if missing:
        raise UserError(f"{where}: rope scaling {rope_type} needs {', '.join(missing)}")
    if rope_type == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        raise UserError(f"{where}: expected low_freq_factor below high_freq_factor in {name}")
    return theta, RopeScaling(rope_type, **numbers)


def _yarn_from_hf(parameters: dict[str, Any], factor: float, where: str) -> dict[str, Any]:
    """Read yarn's parameters, with transformers' defaults. Raises UserError."""

    def grown(name: str) -> float:
        return max(1.0, 0.1 * number(parameters, name, where, 1.0) * math.log(factor) + 1.0)

    both = parameters.get("mscale") and parameters.get("mscale_all_dim")  # DeepSeek's; they may be 0
    default = grown("mscale") / grown("mscale_all_dim") if both else max(1.0, 0.1 * math.log(factor) + 1.0)
    return {
        "attention_factor": number(parameters, "attention_factor", where, default),
        "beta_fast": number(parameters, "beta_fast", where, 32.0, above=LEAST_TURNS),
        "beta_slow": number(parameters, "beta_slow", where, 1.0, above=LEAST_TURNS),
        "truncate": parameters.get("truncate") is None or switch(parameters, "truncate", where),
    }


def _longrope_from_hf(
    parameters: dict[str, Any], factor: float, context: int, channels: int, where: str
) -> dict[str, Any]:
    """Read longrope's parameters, with transformers' defaults. Raises UserError."""
    out: dict[str, Any] = {}
    for name in ("short_factor", "long_factor"):
        factors = parameters.get(name)
        if not isinstance(factors, list) or len(factors) != channels // 2:
            raise UserError(f"{where}: expected {counted(channels // 2, 'number')} for {name}, found {shown(factors)}")
        out[name] = tuple(number({name: value}, name, where, 0.0) for value in factors)
        if 0.0 in out[name]:
            raise UserError(f"{where}: expected numbers above 0 for {name}, found null")
    grown = factor > 1 and context > 1
    default = math.sqrt(1 + math.log(factor) / math.log(context)) if grown else 1.0
    return out | {"attention_factor": number(parameters, "attention_factor", where, default)}


def rope_to_hf(main: Rope, local: Rope, head_dim: int, family: Family) -> dict[str, Any]:
    """Return the fields of `config.json` in the forms of transformers 4 and 5, or of 5 alone if 4 has none.

    `local` is the rotation of the layers with a window.
    """
    if not family.key("rope_theta"):
        return {}
    scaling = _scaling_to_hf(main.scaling)
    out: dict[str, Any] = {"rope_theta": main.theta, "rope_scaling": scaling}
    if main.channels is not None:
        share, rounded_up = main.channels / head_dim, (main.channels + 0.5) / head_dim
        out["partial_rotary_factor"] = share if int(head_dim * share) == main.channels else rounded_up
    if scaling and "original_max_position_embeddings" in scaling and family.partial_rotary:
        out["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]  # phi3 reads it there
    if not family.layer_ropes:
        if main.channels is None:
            out["rope_parameters"] = {"rope_theta": main.theta, **(scaling or {"rope_type": "default"})}
        return out
    if local.scaling is None and "rope_local_base_freq" in family.defaults:
        return out | {"rope_local_base_freq": local.theta}
    usual = family.defaults["rope_theta"]  # transformers' default for the layers with a window
    if local.scaling is None and local.theta == main.theta == usual:
        return out
    del out["rope_scaling"]
    ropes = {"full_attention": main, "sliding_attention": local}
    return out | {
        "rope_parameters": {
            kind: {"rope_theta": rope.theta, **(_scaling_to_hf(rope.scaling) or {"rope_type": "default"})}
            for kind, rope in ropes.items()
        }
    }


def _scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    names = ("rope_type", *_SCALING_FIELDS[scaling.rope_type])
    values = {name: getattr(scaling, name) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
