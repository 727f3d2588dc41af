"""Continue prompts with onnxruntime alone, past and present as numpy arrays. See test_runtimes.py."""

import json
import sys

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

for line in sys.stdin:
    task = json.loads(line)
    session = onnxruntime.InferenceSession(f"{task['folder']}/onnx/{task['file']}", providers=["CPUExecutionProvider"])
    past_inputs = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    outputs = ["logits", *(value.name.replace("past_key_values", "present") for value in past_inputs)]
    tokenizer = Tokenizer.from_file(f"{task['folder']}/tokenizer.json")
    answers = []
    for prompt in task["prompts"]:
        sequence = tokenizer.encode(prompt).ids
        pending, past = sequence[:], [np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for value in past_inputs]
        for _ in range(task["max_new_tokens"]):
            total = len(sequence)
            feeds = {
                "input_ids": np.array([pending]),
                "attention_mask": np.ones((1, total), np.int64),
                "position_ids": np.arange(total - len(pending), total)[None],
                **{value.name: array for value, array in zip(past_inputs, past, strict=True)},
            }
            logits, *past = session.run(outputs, feeds)
            pending = [int(logits[0, -1].argmax())]
            sequence = sequence + pending
            if pending[0] in task["ends"]:
                break
        answers.append(sequence)
    print(json.dumps(answers), flush=True)
