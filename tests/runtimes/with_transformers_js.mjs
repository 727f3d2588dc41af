// Continue prompts with transformers.js on Node; its packages are in the folder NODE_PACKAGES. See test_runtimes.py.

import { createRequire } from "node:module";
import { basename, dirname } from "node:path";
import { createInterface } from "node:readline";

const require = createRequire(`${process.env.NODE_PACKAGES}/`);
const { AutoModelForCausalLM, AutoTokenizer, env } = require("@huggingface/transformers");

env.allowRemoteModels = false;
for await (const line of createInterface({ input: process.stdin })) {
  const task = JSON.parse(line);
  env.localModelPath = dirname(task.folder);
  const name = basename(task.folder);
  const tokenizer = await AutoTokenizer.from_pretrained(name);
  const model = await AutoModelForCausalLM.from_pretrained(name, { dtype: task.dtype });
  const answers = [];
  for (const prompt of task.prompts) {
    const output = await model.generate({ ...tokenizer(prompt), do_sample: false, max_new_tokens: task.max_new_tokens });
    answers.push(Array.from(output.data, Number));
  }
  console.log(JSON.stringify(answers));
}
