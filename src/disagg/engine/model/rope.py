"""Tables of the rotary embedding. Operation by operation as transformers computes them, so that they are bit-equal."""

import math

import torch

from disagg.base.errors import InternalError
from disagg.models.config import FactorsRope, LinearRope, Llama3Rope, LongRope, ModelConfig, YarnRope


def rope_tables(config: ModelConfig, num_positions: int) -> tuple[torch.Tensor, ...]:
    """Return a table for each layer, float32 [num_positions, rotary_dim]; layers that turn alike share it.

    It has the cosines of the rotary_dim / 2 frequencies, then their sines.
    """
    scaling = config.rope_scaling
    magnitude = scaling.attention_factor if isinstance(scaling, YarnRope | FactorsRope) else 1.0
    usual = _table(inverse_frequencies(config), num_positions, magnitude)
    if config.sliding_rope_theta is None:
        return (usual,) * config.num_layers
    sliding = _table(1.0 / _powers(config.sliding_rope_theta, config.rotary_dim), num_positions, 1.0)
    return tuple(usual if window is None else sliding for window in config.sliding_windows)


def _table(frequencies: torch.Tensor, num_positions: int, magnitude: float) -> torch.Tensor:
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos() * magnitude, angles.sin() * magnitude), dim=-1)


def _powers(theta: float, rotary_dim: int) -> torch.Tensor:
    powers: torch.Tensor = theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim)
    return powers


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """Return float32 [rotary_dim / 2], radians per position.

    Raises InternalError while it is open which divisors LongRoPE takes, see ``ModelConfig.for_length``.
    """
    powers = _powers(config.rope_theta, config.rotary_dim)
    frequencies = 1.0 / powers
    match config.rope_scaling:
        case None:
            return frequencies
        case LinearRope(factor=factor):
            return frequencies / factor
        case FactorsRope(divisors=divisors):
            return 1.0 / (torch.tensor(divisors, dtype=torch.float32) * powers)
        case LongRope():
            raise InternalError("LongRoPE's divisors were not chosen")
        case Llama3Rope() as scaling:
            return _llama3(frequencies, scaling)
        case YarnRope() as scaling:
            return _yarn(frequencies, scaling, config)


def _llama3(frequencies: torch.Tensor, scaling: Llama3Rope) -> torch.Tensor:
    """Source: transformers ``_compute_llama3_parameters``."""
    length, low, high = (
        scaling.original_max_position_embeddings,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )
    wavelengths = 2 * math.pi / frequencies
    divided = torch.where(wavelengths > length / low, frequencies / scaling.factor, frequencies)
    smooth = (length / wavelengths - low) / (high - low)
    blended = (1 - smooth) * divided / scaling.factor + smooth * divided
    between = ~(wavelengths < length / high) * ~(wavelengths > length / low)
    return torch.where(between, blended, divided)


def _yarn(frequencies: torch.Tensor, scaling: YarnRope, config: ModelConfig) -> torch.Tensor:
    """Source: transformers ``_compute_yarn_parameters``."""
    dim, base, length = config.rotary_dim, config.rope_theta, scaling.original_max_position_embeddings

    def dimension_of(num_rotations: float) -> float:
        return (dim * math.log(length / (num_rotations * 2 * math.pi))) / (2 * math.log(base))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1 - ramp
    return frequencies / scaling.factor * (1 - kept) + frequencies * kept
