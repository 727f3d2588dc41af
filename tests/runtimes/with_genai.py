"""Continue prompts with onnxruntime-genai. See test_runtimes.py."""

import json
import sys

import onnxruntime_genai

for line in sys.stdin:
    task = json.loads(line)
    config = onnxruntime_genai.Config(task["folder"])
    config.overlay(json.dumps({"model": {"decoder": {"filename": f"onnx/{task['file']}"}}}))
    model = onnxruntime_genai.Model(config)
    tokenizer = onnxruntime_genai.Tokenizer(model)
    answers = []
    for prompt in task["prompts"]:
        ids = tokenizer.encode(prompt)
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(ids) + task["max_new_tokens"], do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        answers.append([int(token) for token in generator.get_sequence(0)])
    print(json.dumps(answers), flush=True)
