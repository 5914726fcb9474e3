"""Choose the layers and hidden states of the teacher that the student's are compared with."""

from __future__ import annotations

from tinygpt2.errors import ConfigError


def layer_pairs(rule: str, student: int, teacher: int) -> list[tuple[int, int]]:
    """Return pairs of a student layer, 1 to M, and the teacher layer, counted from 1, that it learns from.

    Args:
        rule: how to choose the teacher layer for student layer i: `uniform` is round(i*N/M), `last` is N-M+i, `first`
            is i. Or the teacher layers themselves, such as `3,6,9,12`.
        student, teacher: numbers of layers, M and N.

    Raises:
        ConfigError: the rule does not fit the numbers of layers.
    """
    layers = range(1, student + 1)
    if rule == "uniform":
        chosen = [max(1, round(i * teacher / student)) for i in layers]
    elif rule == "last":
        chosen = [teacher - student + i for i in layers]
    elif rule == "first":
        chosen = list(layers)
    else:
        chosen = [int(number) for number in rule.split(",")]
    if len(chosen) != student:
        raise ConfigError(f"--layer-map {rule} names {len(chosen)} layers, but the student has {student}")
    if bad := [number for number in chosen if not 1 <= number <= teacher]:
        raise ConfigError(f"--layer-map {rule}: layer {bad[0]} does not exist, the teacher has layers 1 to {teacher}")
    return list(zip(layers, chosen, strict=True))


def state_pairs(rule: str, layers: list[tuple[int, int]], teacher: int) -> list[tuple[int, int]]:
    """Return the pairs of hidden states to compare. State 0 is the embeddings.

    Args:
        rule: `all` compares the embeddings and every mapped layer, `inner` all but the student's last state. Or the
            numbers of the student's states, such as `0,3`: each is compared with the teacher state that the layer map
            gives it, or with the one after an equals sign, such as `0,3=10`.
        layers: the pairs of layers, as `layer_pairs` returns them.
        teacher: the teacher's number of layers.

    Raises:
        ConfigError: student or teacher does not have a state, or a pair is repeated.
    """
    mapped = {0: 0, **dict(layers)}
    if rule == "all":
        return list(mapped.items())
    if rule == "inner":
        return list(mapped.items())[:-1]
    pairs = []
    for item in rule.split(","):
        number, _, target = item.partition("=")
        if int(number) not in mapped:
            raise ConfigError(f"--hidden-map {rule}: the student has states 0 to {len(layers)}, but not {number}")
        if target and int(target) > teacher:
            raise ConfigError(f"--hidden-map {rule}: the teacher has states 0 to {teacher}, but not {target}")
        pairs.append((int(number), int(target) if target else mapped[int(number)]))
    if len(set(pairs)) < len(pairs):
        raise ConfigError(f"--hidden-map {rule} names the same pair of states twice")
    return pairs
