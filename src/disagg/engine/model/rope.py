"""Tables of the rotary embedding. Operation by operation as transformers computes them, so that they are bit-equal."""

import math

import torch

from disagg.models.config import FactorsRope, LinearRope, Llama3Rope, ModelConfig, YarnRope


def rope_table(config: ModelConfig, num_positions: int) -> torch.Tensor:
    """Return float32 [num_positions, head_dim]: cosines of the head_dim / 2 frequencies, then sines."""
    frequencies = inverse_frequencies(config)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    scaling = config.rope_scaling
    magnitude = scaling.attention_factor if isinstance(scaling, YarnRope) else 1.0
    return torch.cat((angles.cos() * magnitude, angles.sin() * magnitude), dim=-1)


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """Return float32 [head_dim / 2], radians per position."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    match config.rope_scaling:
        case None:
            return frequencies
        case LinearRope(factor=factor):
            return frequencies / factor
        case FactorsRope(divisors=divisors):
            return frequencies / torch.tensor(divisors, dtype=torch.float32)
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
    dim, base, length = config.head_dim, config.rope_theta, scaling.original_max_position_embeddings

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
