"""How large a student can be cut from a teacher: checks that need only the teacher's configuration."""

from __future__ import annotations

from typing import Any

from tinygpt2.config.compression import Position, TruncateStudentConfig
from tinygpt2.errors import ConfigError


def check_sizes(config: TruncateStudentConfig, teacher: Any) -> None:
    """Check the layers, the width and the positions that the options ask for.

    Args:
        teacher: the teacher's configuration, or an object with the same sizes.

    Raises:
        ConfigError: the teacher has no such parts, or they do not fit together, or an option has no effect.
    """
    sizes_of(config, teacher)
    if config.untie_head and not getattr(teacher, "tie_word_embeddings", True):
        raise ConfigError("--untie-head has no effect: the teacher has an output matrix of its own already")
    _check_depth(config, teacher.n_layer)
    position_count(config, teacher.n_positions)


def sizes_of(config: TruncateStudentConfig, teacher: Any) -> tuple[int, int, int]:
    """Return the student's width, heads and inner units.

    Args:
        teacher: the teacher's configuration.

    Raises:
        ConfigError: the student would be wider than the teacher, or have more heads, or its heads do not divide its
            width.
    """
    head_width = teacher.n_embd // teacher.n_head
    if (config.n_head or 0) > teacher.n_head:
        raise ConfigError(f"--n-head {config.n_head}: the teacher has only {teacher.n_head} heads")
    width = config.n_embd or (config.n_head or teacher.n_head) * head_width
    if width > teacher.n_embd:
        raise ConfigError(f"--n-embd {width}: the teacher's hidden size is only {teacher.n_embd}")
    possible = [count for count in range(1, teacher.n_head + 1) if width % count == 0]
    heads = config.n_head or max(possible)  # narrower heads lose less than fewer heads: see docs/students.md
    if heads not in possible:
        raise ConfigError(
            f"--n-embd {width} with --n-head {heads}: the heads share the hidden size equally",
            f"for --n-embd {width}, --n-head can be {', '.join(map(str, possible))}",
        )
    whole = teacher.n_inner or 4 * teacher.n_embd
    inner = config.n_inner or max(1, whole * width // teacher.n_embd)
    if inner > whole:
        raise ConfigError(f"--n-inner {inner}: the teacher has only {whole} inner units")
    return width, heads, inner


def _check_depth(config: TruncateStudentConfig, total: int) -> None:
    """Check the layers that the options ask for.

    Raises:
        ConfigError: a block does not exist, is repeated, or is not in ascending order.
    """
    if config.num_layers is not None and config.num_layers > total:
        raise ConfigError(f"--num-layers {config.num_layers}: the teacher has only {total} layers")
    if config.layers is None:
        return
    layers = [int(number) for number in config.layers.split(",")]
    if bad := [layer for layer in layers if layer >= total]:
        raise ConfigError(f"--layers: block {bad[0]} does not exist, the teacher has blocks 0 to {total - 1}")
    if sorted(set(layers)) != layers:
        raise ConfigError(f"--layers {config.layers}: list the blocks in ascending order, each of them once")


def position_count(config: TruncateStudentConfig, total: int) -> tuple[int, Position]:
    """Return how many positions the student has, and how they are chosen.

    Raises:
        ConfigError: the teacher has fewer.
    """
    if (config.n_positions or 0) > total:
        raise ConfigError(f"--n-positions {config.n_positions}: the teacher has only {total} positions")
    return config.n_positions or total, config.position or "first"
