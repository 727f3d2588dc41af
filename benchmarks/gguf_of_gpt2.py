"""
GPT-2's checkpoint as llama.cpp reads it, in three precisions.

    python gguf_of_gpt2.py FOLDER OUTPUT     in an environment with gguf and llama-cpp-python

The names are those of llama.cpp's own converter, which no package ships.
"""

import json
import sys
from pathlib import Path

import gguf
import llama_cpp
from safetensors.numpy import load_file

NAMES = {
    "wte.weight": "token_embd.weight",
    "wpe.weight": "position_embd.weight",
    "ln_f.weight": "output_norm.weight",
    "ln_f.bias": "output_norm.bias",
}
BLOCK_NAMES = {
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
FORMATS = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}


def main() -> None:
    folder, output = Path(sys.argv[1]), Path(sys.argv[2])
    whole = output / "gpt2-F32.gguf"
    write_float32(folder, whole)
    for name, file_type in FORMATS.items():
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.nthread = file_type, 2
        path = output / f"gpt2-{name}.gguf"
        if llama_cpp.llama_model_quantize(str(whole).encode(), str(path).encode(), parameters):
            sys.exit(f"llama.cpp could not quantise to {name}")


def write_float32(folder: Path, path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")), config)
    for name, tensor in load_file(folder / "model.safetensors").items():
        is_matrix = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        writer.add_tensor(new_name(name.removeprefix("transformer.")), tensor.T.copy() if is_matrix else tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict, config: dict) -> None:
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    ids = tokenizer["model"]["vocab"] | special
    tokens = sorted(ids, key=ids.__getitem__)
    types = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["eos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def new_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, index, rest = name.split(".", 2)
    layer, parameter = rest.rsplit(".", 1)
    return f"blk.{index}.{BLOCK_NAMES[layer]}.{parameter}"


if __name__ == "__main__":
    main()
