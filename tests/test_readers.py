"""The reader of descriptions: what it may leave out, it leaves out without another result."""

import pytest
import torch

from lorag.networks.readers import TokenReader


def _reader(layers):
    torch.manual_seed(0)
    return TokenReader(24, width=16, queries=3, layers=layers, heads=2, dropout=0.1).eval()


def _inputs():
    mask = torch.arange(7)[None] < torch.tensor([[7], [3], [5]])
    return torch.randn(3, 24), torch.randn(3, 7, 24), mask


def _all_positions(reader, pooled, tokens, mask):
    """The same reading with torch's own encoder, which works out every position in every layer."""
    words = reader.inward(torch.cat([pooled[:, None], tokens], 1)) + reader.positions[: tokens.shape[1] + 1]
    asked = reader.queries.expand(len(words), -1, -1)
    count = asked.shape[1]
    padding = torch.cat([mask.new_zeros(len(mask), count + 1), ~mask], 1)
    hidden = torch.zeros(padding.shape[1], padding.shape[1], dtype=torch.bool)
    hidden[:, :count] = ~torch.eye(padding.shape[1], dtype=torch.bool)[:, :count]
    read = reader.body(torch.cat([asked, words], 1), mask=hidden, src_key_padding_mask=padding)
    return reader.norm(read[:, :count]).flatten(1)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_last_layer_works_out_the_queries_alone(layers):
    """Values and gradients are those of an encoder that works out everything."""
    reader, inputs = _reader(layers), _inputs()
    guessed, right = reader(*inputs), _all_positions(reader, *inputs)
    assert torch.allclose(guessed, right, atol=1e-5)
    weights = torch.randn_like(right)
    parameters = list(reader.parameters())
    found = torch.autograd.grad((guessed * weights).sum(), parameters)
    expected = torch.autograd.grad((right * weights).sum(), parameters)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected, strict=True))


def test_what_a_mask_hides_is_not_read():
    """Other vectors at hidden positions change nothing, and one more at a real position does."""
    reader = _reader(2)
    pooled, tokens, mask = _inputs()
    other = torch.where(mask[..., None], tokens, torch.randn_like(tokens))
    assert torch.allclose(reader(pooled, tokens, mask), reader(pooled, other, mask), atol=1e-6)
    moved = tokens.clone()
    moved[1, 2] = torch.randn(24)  # adding one number to all would be normalised away
    assert (reader(pooled, tokens, mask) - reader(pooled, moved, mask))[1].norm() > 1e-2
