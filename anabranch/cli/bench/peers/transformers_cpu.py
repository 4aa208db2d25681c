"""transformers on the CPU as a contender; runs in the environment of `make bench-peers`, apart from ours."""

import itertools
import json
import sys
import time

import torch
import transformers


def main(settings):
    """Serve batches until standard input ends."""
    torch.set_num_threads(settings["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=getattr(torch, settings["dtype"]), attn_implementation="sdpa"
    ).eval()
    print(json.dumps({"ready": {"transformers": transformers.__version__}}), flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(model, json.loads(line))), flush=True)


@torch.inference_mode()
def serve(model, work):
    """Run a batch of equally long prompts with one cache."""
    inputs, cache = torch.tensor(work["prompts"]), transformers.DynamicCache(config=model.config)
    times = [time.monotonic()]
    for _ in range(work["steps"] + 2):
        answer = model(inputs, None, None, cache, use_cache=True, logits_to_keep=1)
        inputs = answer.logits[:, -1:].argmax(-1)
        times.append(time.monotonic())
    steps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return {"prefill_s": steps[0], "step_s": steps[1:]}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
