"""Which layers and states of the teacher a student's are compared with."""

from __future__ import annotations

from tinygpt2.errors import ConfigError


def layer_pairs(rule: str, student: int, teacher: int) -> list[tuple[int, int]]:
    """Return each student layer 1..M with the teacher layer, counted from 1, that it learns from.

    Args:
        rule: `uniform` round(i*N/M), `last` N-M+i, `first` i, or the numbers themselves, as `3,6,9,12`.
        student, teacher: numbers of layers, M and N.

    Raises:
        ConfigError: the rule does not fit the two depths.
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
        raise ConfigError(f"--layer-map {rule} names {len(chosen)} layers, the student has {student}")
    if bad := [number for number in chosen if not 1 <= number <= teacher]:
        raise ConfigError(f"--layer-map {rule}: layer {bad[0]} is not one of the teacher's 1 to {teacher}")
    return list(zip(layers, chosen, strict=True))


def state_pairs(rule: str, layers: list[tuple[int, int]], teacher: int) -> list[tuple[int, int]]:
    """Return the pairs of hidden states that are compared; state 0 is the embeddings.

    Args:
        rule: `all` for the embeddings and every mapped layer, `inner` for all but the student's last state,
            or the student's states, as `0,3`, each with the teacher's by the layer map or a named one, as
            `0,3=10`.
        layers: the pairs of layers.
        teacher: the teacher's number of layers.

    Raises:
        ConfigError: a state that student or teacher does not have.
    """
    mapped = {0: 0, **dict(layers)}
    if rule == "all":
        return list(mapped.items())
    if rule == "inner":
        return list(mapped.items())[:-1]
    pairs = []
    for item in rule.split(","):
        mine, _, theirs = item.partition("=")
        if int(mine) not in mapped:
            raise ConfigError(f"--hidden-map {rule}: the student has states 0 to {len(layers)}, no {mine}")
        if theirs and int(theirs) > teacher:
            raise ConfigError(f"--hidden-map {rule}: the teacher has states 0 to {teacher}, no {theirs}")
        pairs.append((int(mine), int(theirs) if theirs else mapped[int(mine)]))
    if len(set(pairs)) < len(pairs):
        raise ConfigError(f"--hidden-map {rule} names a pair of states twice")
    return pairs
