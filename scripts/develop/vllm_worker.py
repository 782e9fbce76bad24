"""vLLM's side of `benchmark.py decode --vllm`: run in vLLM's environment, it answers a line of JSON with another.

A line has the `prompts`, as lists of token ids, and how many `tokens` to answer; the reply has the `answers` and the
`seconds` of a decoding step, the median of those after the first two: prompts that came before are read in one.
"""

import json
import os
import statistics
import sys
import time


def main() -> None:
    directory, dtype, max_model_len = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes its own lines to the standard output

    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = LLM(
        directory,
        dtype=dtype,
        max_model_len=int(max_model_len),
        skip_tokenizer_init=True,
        enable_prefix_caching=True,  # a prompt that comes again is not read again
    ).llm_engine
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        sampling = SamplingParams(
            temperature=0,
            max_tokens=request["tokens"],
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for index, prompt in enumerate(request["prompts"]):
            engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling)
        seconds, answers = [], {}
        while engine.has_unfinished_requests():
            start = time.perf_counter()
            outputs = engine.step()
            seconds.append(time.perf_counter() - start)
            answers.update({output.request_id: list(output.outputs[0].token_ids) for output in outputs})
        # An identifier may come back with a suffix; they are numbers, in order.
        answers = [answers[name] for name in sorted(answers, key=lambda name: int(name.partition("-")[0]))]
        print(json.dumps({"seconds": statistics.median(seconds[2:]), "answers": answers}), file=replies, flush=True)


if __name__ == "__main__":
    main()
