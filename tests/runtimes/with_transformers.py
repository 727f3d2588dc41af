"""Continue prompts with transformers, from model.safetensors. See test_runtimes.py."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

for line in sys.stdin:
    task = json.loads(line)
    model = AutoModelForCausalLM.from_pretrained(task["folder"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(task["folder"])
    answers = []
    for prompt in task["prompts"]:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(
                **inputs, do_sample=False, max_new_tokens=task["max_new_tokens"], pad_token_id=tokenizer.eos_token_id
            )
        answers.append(output[0].tolist())
    print(json.dumps(answers), flush=True)
