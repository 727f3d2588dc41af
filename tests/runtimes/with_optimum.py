"""Continue prompts with optimum's ORTModelForCausalLM. See test_runtimes.py."""

import json
import sys

from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

for line in sys.stdin:
    task = json.loads(line)
    model = ORTModelForCausalLM.from_pretrained(task["folder"], subfolder="onnx", file_name=task["file"])
    tokenizer = AutoTokenizer.from_pretrained(task["folder"])
    answers = []
    for prompt in task["prompts"]:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=task["max_new_tokens"], pad_token_id=tokenizer.eos_token_id
        )
        answers.append(output[0].tolist())
    print(json.dumps(answers), flush=True)
