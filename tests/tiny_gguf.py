"""A tiny Llama in a GGUF file, as llama.cpp's converter writes it: permuted q and k, a byte-level vocabulary, a chat template."""

import gguf
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

MERGES = [("a", "b"), ("Ġ", "Ġ"), ("1", "2"), ("Ċ", "Ċ")]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
HEADS, KEYS = 4, 2


def tiny_llama(vocabulary):
    """The model that the file holds, in fp32."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        rms_norm_eps=1e-5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model.requires_grad_(False).eval()


def write_gguf(path, *, kind="F32", architecture="llama", pre="smollm", vocabulary=True):
    """Writes it with weights of a type such as "Q4_1", and returns the model with the weights that the file stands for."""
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    model = tiny_llama(len(tokens))
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(tokens))
    if vocabulary:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
        writer.add_token_merges([" ".join(pair) for pair in MERGES])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_pad_token_id(2)
        writer.add_add_bos_token(False)
        writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    state = model.state_dict()
    for name, weight in state.items():
        if name == "lm_head.weight":
            continue
        values = weight.clone()
        heads = {"q_proj": HEADS, "k_proj": KEYS}.get(name.split(".")[-2])
        if heads:
            values = values.view(heads, 2, -1, values.shape[1]).transpose(1, 2).reshape(values.shape)
        target = names.get_name(name, (".weight",))
        if values.dim() == 1 or kind == "F32":
            writer.add_tensor(target, values.numpy())
            continue
        quantised = gguf.GGMLQuantizationType[kind]
        stored = gguf.quantize(values.numpy(), quantised)
        writer.add_tensor(target, stored, raw_dtype=quantised)
        back = torch.from_numpy(gguf.dequantize(stored, quantised).copy())
        if heads:
            back = back.view(heads, -1, 2, back.shape[1]).transpose(1, 2).reshape(back.shape)
        weight.copy_(back)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
