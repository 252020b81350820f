"""llama.cpp in this process, by the package xllamacpp: a base model in fp32, adapters, answers in tokens with log-probabilities."""

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import gguf

SLOTS, CONTEXT = 10, 96


def widened(source, path):
    """Writes a GGUF model anew with all weights in fp32, which changes no number: what llama.cpp then computes it computes in fp32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type", "general.quantization_version"):
            many = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=field.types[-1] if many else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Answer:
    """Tokens of a greedy answer, the log-probability of each, and whether it ended by itself."""

    def __init__(self, reply):
        self.tokens = [one["id"] for one in reply["completion_probabilities"]]
        self.logprobs = [one["logprob"] for one in reply["completion_probabilities"]]
        self.ended = reply["stop_type"] == "eos"
        self.text = reply["content"]


class LlamaCpp:
    """A server on 127.0.0.1 with adapters by number; each request says which of them it wants, and how much."""

    def __init__(self, model, adapters=(), threads=1):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.port, params.warmup, params.verbosity = SLOTS * CONTEXT, SLOTS, 0, False, 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # keys and values are kept in fp16 otherwise
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 0.0) for path in adapters]
        self._server, self._adapters = xllamacpp.Server(params), len(adapters)

    def close(self):
        """Stops the server."""
        self._server = None

    def answers(self, prompts, scales=None, most=12, grammar=""):
        """Greedy answers to prompts of token ids, held to any grammar; `scales` gives the scale of adapters by number, 0 for others."""
        lora = [{"id": number, "scale": (scales or {}).get(number, 0.0)} for number in range(self._adapters)]

        def ask(ids):
            # Prompt states are kept across adapters otherwise, and answer for the wrong one.
            body = {"prompt": ids, "n_predict": most, "temperature": 0, "n_probs": 1, "cache_prompt": False}
            body |= {"lora": lora, "grammar": grammar}
            request = urllib.request.Request(
                f"{self._server.listening_address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=300) as reply:
                return Answer(json.load(reply))

        with ThreadPoolExecutor(SLOTS) as pool:
            return list(pool.map(ask, prompts))
