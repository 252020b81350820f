"""Two-layer base models of the recipes' architectures as folders, with tokenizers and processors made on the spot, and images."""

import io

import numpy
import torch
import transformers
from conftest import BOS, EOS, PAD, SIZE, VOCABULARY
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}
_ENDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_TEXT = {
    "vocab_size": SIZE,
    **_ENDS,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
}
_TOWER = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2}


def words_tokenizer(more=(), begins=True, **special):
    """One token per word of the tests' vocabulary; without `begins` no token stands before a text, as with Qwen."""
    words = [*VOCABULARY, *more]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"} | ({"bos_token": "<s>"} if begins else {})
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, padding_side="right", **ends, **special)


_CHAT = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"


def _decoder(name, begins=True, chat=None):
    config, model = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")

    def make():
        tokenizer = words_tokenizer(begins=begins)
        tokenizer.chat_template = chat
        return model(config(**_TEXT)), tokenizer

    return make


def _t5():
    ends = {"vocab_size": SIZE, **_ENDS, "decoder_start_token_id": PAD}
    config = transformers.T5Config(**ends, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    return transformers.T5ForConditionalGeneration(config), words_tokenizer()


def _clip():
    text = {**_TOWER, "vocab_size": SIZE, **_ENDS, "max_position_embeddings": 77}
    vision = {**_TOWER, "image_size": 16, "patch_size": 8}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    size = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return model, transformers.CLIPProcessor(size, words_tokenizer())


def _florence2():
    tokenizer = words_tokenizer(["<image>"], extra_special_tokens={"image_token": "<image>"})
    tokenizer.add_tokens([f"<loc_{place}>" for place in range(1000)])
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    text = {"model_type": "bart", "vocab_size": len(tokenizer), "d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, **layers}
    text |= {**_ENDS, "decoder_start_token_id": EOS, "forced_bos_token_id": BOS, "max_position_embeddings": 256}
    vision = {"depths": [1, 1, 1, 1], "embed_dim": [8, 16, 24, 32], "num_heads": [1, 2, 3, 4], "num_groups": [1, 2, 3, 4]}
    config = transformers.Florence2Config(
        text_config=text, vision_config={**vision, "window_size": 2, "projection_dim": 32}, image_token_id=tokenizer.image_token_id
    )
    # 64 pixels become 2 x 2 places, and their mean is one more.
    images = CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False, image_seq_length=5)
    return transformers.Florence2ForConditionalGeneration(config), transformers.Florence2Processor(images, tokenizer)


TINY = {
    "qwen2": _decoder("Qwen2", begins=False, chat=_CHAT),
    "gemma2": _decoder("Gemma2"),
    "mistral": _decoder("Mistral"),
    "llama": _decoder("Llama"),
    "t5": _t5,
    "clip": _clip,
    "florence2": _florence2,
}


def save_tiny(name, folder):
    """Writes a tiny base model with its tokenizer or processor, weights from a fixed seed, as its publisher would."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, reader = TINY[name]()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.2)
    model.tie_weights()
    model.save_pretrained(folder)
    reader.save_pretrained(folder)
    return folder


def picture(colour, seed, kind="PNG", size=(24, 18)):
    """Bytes of an image of about one colour."""
    noise = numpy.random.default_rng(seed).integers(-25, 26, (size[1], size[0], 3))
    pixels = numpy.clip(numpy.array(COLOURS[colour]) + noise, 0, 255).astype("uint8")
    raw = io.BytesIO()
    Image.fromarray(pixels).save(raw, kind)
    return raw.getvalue()
