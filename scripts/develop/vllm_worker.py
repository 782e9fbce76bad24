"""The side of `benchmark.py decode --vllm` that runs in vLLM's environment and answers lines of JSON.

A line has the `prompts`, as lists of token ids, and the number of `tokens` to generate. The reply has the `answers` and
the `seconds` of a decoding step: the median without the first two, in which the prompts are read.
"""

import json
import os
import statistics
import sys
import time


def main() -> None:
    directory, dtype, max_model_len = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes to standard output

    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = LLM(
        directory,
        dtype=dtype,
        max_model_len=int(max_model_len),
        skip_tokenizer_init=True,
        enable_prefix_caching=True,  # repeated prompts are not read again
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
        # vLLM may add a suffix to the ids, which are numbers.
        answers = [answers[name] for name in sorted(answers, key=lambda name: int(name.partition("-")[0]))]
        print(json.dumps({"seconds": statistics.median(seconds[2:]), "answers": answers}), file=replies, flush=True)


if __name__ == "__main__":
    main()
