"""
A GGUF file in two precisions of llama.cpp, by its own quantiser: Q8_0.gguf and Q4_0.gguf.

    python quantise_gguf.py FILE FOLDER     in an environment with llama-cpp-python

What has few bits already is made float32 first.
"""

import sys
from pathlib import Path

import llama_cpp

FORMATS = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}


def main() -> None:
    file, folder = Path(sys.argv[1]), Path(sys.argv[2])
    for name, file_type in FORMATS.items():
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.nthread, parameters.allow_requantize = file_type, 2, True
        if llama_cpp.llama_model_quantize(str(file).encode(), str(folder / f"{name}.gguf").encode(), parameters):
            sys.exit(f"llama.cpp could not quantise {file} to {name}")


if __name__ == "__main__":
    main()
