"""Several examples of one task in one row: the prompt's beginning, which they share, is read once, and little is padded.

Each example sees the shared beginning and itself, at the positions that it would have in a row of its own, so that losses are equal.
It takes a model that places tokens by `position_ids` and takes a mask for each pair of tokens, as decoders with rotary embeddings do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PackedRows", "fitting", "pack", "shared_start"]

Tokens = tuple[list[int], list[int]]  # of a prompt, and of its answer

_SHARED = -1  # segment of the shared beginning
_PADDING = -2


@dataclass(frozen=True)
class PackedRows:
    """One row for each task.

    Attributes:
        input_ids: Tokens (n, t).
        position_ids: Where each would stand in a row of its own example (n, t).
        seen: Which tokens each token sees (n, 1, t, t).
        rows: Row of each of q predicted tokens (q,).
        columns: Column of the token before it (q,).
        targets: The predicted tokens (q,).
    """

    input_ids: Tensor
    position_ids: Tensor
    seen: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor


def shared_start(prompts: Sequence[Sequence[int]]) -> int:
    """Number of tokens with which all prompts begin; each keeps at least one of its own."""
    shortest = min(len(prompt) for prompt in prompts)
    count = 0
    while count < shortest - 1 and len({prompt[count] for prompt in prompts}) == 1:
        count += 1
    return count


def fitting(examples: Sequence[Tokens], most: int) -> Sequence[Tokens]:
    """The first examples that fit into a row of `most` tokens together, at least one."""
    start, total, count = shared_start([prompt for prompt, _ in examples]), 0, 0
    for prompt, answer in examples:
        total += len(prompt) - start + len(answer)
        if count and start + total > most:
            break
        count += 1
    return examples[:count]


def pack(groups: Sequence[Sequence[Tokens]], pad: int) -> PackedRows:
    """Packs (prompt, answer) of tokens, one group per row.

    Args:
        groups: n groups.
        pad: Token that fills rows up.
    """
    start = shared_start([prompt for group in groups for prompt, _ in group])
    tokens, segments, places, targets = [], [], [], []
    for row, group in enumerate(groups):
        beginning = list(group[0][0][:start])
        ids, segment, place = beginning, [_SHARED] * start, list(range(start))
        for number, (prompt, answer) in enumerate(group):
            text = [*prompt[start:], *answer[:-1]]
            first = len(ids) + len(prompt) - start - 1  # the prompt's last token, which predicts the answer's first
            targets += [(row, first + offset, token) for offset, token in enumerate(answer)]
            ids, segment = ids + text, segment + [number] * len(text)
            place = place + list(range(start, start + len(text)))
        tokens.append(torch.tensor(ids))
        segments.append(torch.tensor(segment))
        places.append(torch.tensor(place))
    fill = torch.nn.utils.rnn.pad_sequence
    input_ids, position_ids = fill(tokens, batch_first=True, padding_value=pad), fill(places, batch_first=True)
    segment_ids = fill(segments, batch_first=True, padding_value=_PADDING)
    earlier = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).tril()
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    seen = (same | (segment_ids == _SHARED)[:, None, :]) & earlier
    rows, columns, predicted = torch.tensor(targets).unbind(1)
    return PackedRows(input_ids, position_ids, seen[:, None], rows, columns, predicted)
