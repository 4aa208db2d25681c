"""vLLM on the CPU as a contender; runs in the environment of `make bench-peers`, apart from ours."""

import itertools
import json
import os
import sys
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import vllm


def main(settings):
    """Serve batches until standard input ends."""
    llm = vllm.LLM(
        model=settings["model"],
        dtype=settings["dtype"],
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=settings["max_model_len"],
        max_num_seqs=64,
        max_num_batched_tokens=settings["max_num_batched_tokens"],
        enforce_eager=settings["enforce_eager"],
        block_size=settings["block_size"],
        disable_log_stats=True,
    )
    print(json.dumps({"ready": {"vllm": vllm.__version__}}), flush=True)
    numbers = itertools.count()
    for line in sys.stdin:
        print(json.dumps(serve(llm.llm_engine, json.loads(line), numbers)), flush=True)


def serve(engine, work, numbers):
    """Run a batch, timing each step of the engine."""
    batch = len(work["prompts"])
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=work["steps"] + 2, ignore_eos=True, detokenize=False
    )
    began_s = time.monotonic()
    for prompt in work["prompts"]:
        engine.add_request(f"bench-{next(numbers)}", {"prompt_token_ids": prompt}, sampling)
    prefill_s, step_s, started = 0.0, [], set()
    while engine.has_unfinished_requests():
        step_began_s = time.monotonic()
        outputs = engine.step()
        now_s = time.monotonic()
        if len(started) == batch and len(outputs) == batch:
            step_s.append(now_s - step_began_s)
        started |= {output.request_id for output in outputs if output.outputs[0].token_ids}
        if len(started) == batch and not prefill_s:
            prefill_s = now_s - began_s
    return {"prefill_s": prefill_s, "step_s": step_s}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
