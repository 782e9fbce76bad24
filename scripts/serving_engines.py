"""The serving engines: how each is started, and how it is asked. Another engine is another subclass of `Engine`."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from checkpoint_files import Checkpoint, Step3VLConfig
from engines import MAX_AMX_HEADS, RELEASED_SIZES, picture_sizes, query_heads_per_group
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk
from starlette.exceptions import HTTPException
from transformers import GenerationConfig, PreTrainedTokenizerFast


SCRIPTS = Path(__file__).resolve().parent
TOOL_TOKENS = ("<｜tool_calls_begin｜>", "<｜tool_call_begin｜>", "<｜tool_call_end｜>", "<｜tool_calls_end｜>")
THINK_START, THINK_END = "<think>", "</think>"


@dataclass
class Engine:
    """
    An engine that serves one checkpoint with the OpenAI API on a socket in the file system. Its class has a static
    method `is_installed`, and `command`, which returns the command that starts it on a socket with more options, and
    the environment variables to add, or raises a `ValueError` if it cannot serve the checkpoint.
    """

    checkpoint: Checkpoint
    thinks: bool = False

    name, title = "", ""
    # Requests that it computes at a time, and that may be open.
    slots, max_requests = 1, 1
    # Fields that it ignores, and their values that it obeys nevertheless.
    unsupported = {}

    def __post_init__(self):
        config, directory = self.checkpoint.config, self.checkpoint.directory
        self.takes_pictures = isinstance(config, Step3VLConfig)
        self.context = config.get_text_config().longest_sequence or config.get_text_config().max_position_embedding
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
        added = self.tokenizer.added_tokens_decoder.items()
        self.special_tokens = {token.content: number for number, token in added if token.special}
        self.image_token = None
        if self.takes_pictures:
            self.image_token = self.tokenizer.convert_ids_to_tokens(config.image_token_id)
            self.special_tokens[self.image_token] = config.image_token_id
        has_settings = (directory / "generation_config.json").exists()
        settings = GenerationConfig.from_pretrained(directory) if has_settings else GenerationConfig()
        # What a request that leaves a field out means, so that it means the same for each engine.
        self.defaults = {
            "temperature": float(settings.temperature or 1) if settings.do_sample else 0.0,
            "top_p": settings.top_p or 1.0,
            "top_k": settings.top_k or 0,
            "min_p": settings.min_p or 0.0,
            "repetition_penalty": settings.repetition_penalty or 1.0,
        } | ({"max_tokens": settings.max_new_tokens} if settings.max_new_tokens else {})

    def check(self, body: dict) -> None:
        """Removes the fields that it ignores. Raises an `HTTPException` if they would have an effect."""
        for name, value in self.unsupported.items():
            if json.dumps(body.pop(name, value)) != json.dumps(value):
                others = [engine.title for engine in ENGINES.values() if name not in engine.unsupported]
                reason = f"{self.title} does not support this value of `{name}`; {' and '.join(others)} does."
                raise HTTPException(400, reason)
        if body.get("chat_template_kwargs", {}).get("enable_thinking") and THINK_END not in self.tokenizer.get_vocab():
            raise HTTPException(400, f"This model does not reason: it has no token {THINK_END}.")

    def requests(self, body: dict, is_stream: bool) -> list[dict]:
        """The requests to send one after the other."""
        return [{**body, "stream": is_stream}]

    def join(self, path: str, events: list[dict]) -> dict:
        """The whole answer, for a client that does not take a stream."""
        return events[0]


class TransformersEngine(Engine):
    """
    `transformers serve`, which computes one request at a time. It is always asked for a stream, because it would go on
    computing any other answer after its client has left.
    """

    name, title = "transformers", "transformers serve"
    max_requests = 32
    unsupported = {
        "n": 1,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "logprobs": False,
        "top_logprobs": 0,
        "stop": [],
        "echo": False,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
    }

    @staticmethod
    def is_installed() -> bool:
        return all(map(importlib.util.find_spec, ("fastapi", "step3_vl")))

    def command(self, socket: str, options: list[str]) -> tuple[list[str], dict[str, str]]:
        if any(option.startswith("--continuous-batching") for option in options):
            raise ValueError(
                "--continuous-batching applies the settings of the first request to all, and one failure ends it; "
                "use vLLM to serve several requests at a time."
            )
        reasoning = ["--reasoning", "on"] * self.thinks
        command = [sys.executable, str(SCRIPTS / "transformers_engine.py"), "serve", str(self.checkpoint.directory)]
        return [*command, "--log-level", "error", *reasoning, *options], {"STEP3_ENGINE_SOCKET": socket}

    def check(self, body: dict) -> None:
        super().check(body)
        prompts = body.get("prompt", "")
        if not isinstance(prompts, str) and not isinstance(prompts[0], str):
            raise HTTPException(400, f"{self.title} does not take token ids; vLLM does.")

    def requests(self, body: dict, is_stream: bool) -> list[dict]:
        temperature, others = body["temperature"], ("top_p", "top_k", "min_p")
        settings = {"max_new_tokens": body.get("max_tokens", self.context), "do_sample": temperature > 0}
        settings["repetition_penalty"] = body["repetition_penalty"]
        if temperature > 0:  # below 0.01, as in vLLM, the logits would overflow
            settings |= {"temperature": max(temperature, 0.01), **{name: body[name] for name in others}}
        if body.get("logit_bias"):
            settings["sequence_bias"] = [[[token], bias] for token, bias in body["logit_bias"].items()]
        kept = {name: body[name] for name in ("tools", "chat_template_kwargs", "seed") if name in body}
        request = {**kept, "generation_config": json.dumps(settings), "stream": True}
        if "prompt" in body:
            prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
            return [{**request, "prompt": prompt} for prompt in prompts]
        return [{**request, "messages": [{**message, "content": parts_of(message)} for message in body["messages"]]}]

    def join(self, path: str, events: list[dict]) -> dict:
        if path == "/v1/completions":
            return join_texts(events)
        state = ChatCompletionStreamState()
        for event in events:
            state.handle_chunk(ChatCompletionChunk.model_validate(event))
        answer = state.current_completion_snapshot.to_dict(exclude_none=True)
        for choice in answer["choices"]:
            choice["message"].setdefault("content", None)
            for call in choice["message"].get("tool_calls", []):
                del call["index"]
        return {**answer, "object": "chat.completion"}


def parts_of(message: dict) -> list[dict]:
    """A message's content as processors take it."""
    content = message.get("content") or []
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [part if part["type"] == "text" else {"type": "image", "url": part["image_url"]["url"]} for part in parts]


def join_texts(events: list[dict]) -> dict:
    choices, usage = {}, {}
    for event in events:
        usage = add_usage(usage, event.get("usage"))
        for choice in event["choices"]:
            text = choices.get(choice["index"], {}).get("text", "") + choice["text"]
            choices[choice["index"]] = {"finish_reason": None, **choice, "text": text}
    return {**events[-1], "choices": list(choices.values()), "usage": usage}


def add_usage(usage: dict, more: dict | None) -> dict:
    counts = {name: count for name, count in (more or {}).items() if isinstance(count, int)}
    return {**usage, **(more or {}), **{name: usage.get(name, 0) + count for name, count in counts.items()}}


class VLLMEngine(Engine):
    name, title = "vllm", "vLLM"
    slots, max_requests = 256, 512

    @staticmethod
    def find() -> str | None:
        """The `vllm` command next to this Python, or else on the path."""
        return shutil.which("vllm", path=Path(sys.executable).parent) or shutil.which("vllm")

    @staticmethod
    def is_installed() -> bool:
        return VLLMEngine.find() is not None

    @property
    def sizes(self) -> dict[str, int] | None:
        """The image sizes that every request must have, if they are not the released ones."""
        sizes = picture_sizes(self.checkpoint) if self.takes_pictures else RELEASED_SIZES
        return None if sizes == RELEASED_SIZES else sizes

    def command(self, socket: str, options: list[str]) -> tuple[list[str], dict[str, str]]:
        self._check_processor()
        config = self.checkpoint.config
        command = [self.find(), "serve", str(self.checkpoint.directory), "--uds", socket, *self._parsers()]
        command += ["--served-model-name", "model", "--disable-uvicorn-access-log"]
        if config.dtype is not None:
            command += ["--dtype", str(config.dtype).removeprefix("torch.")]
        if self.sizes:
            command += ["--mm-processor-kwargs", json.dumps(self.sizes), "--trust-request-mm-kwargs"]
        return [*command, *options], {"VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1")}

    def _check_processor(self) -> None:
        try:
            is_for_cpu = importlib.metadata.version("vllm").endswith("+cpu")
            has_amx = "amx_tile" in Path("/proc/cpuinfo").read_text()
        except (importlib.metadata.PackageNotFoundError, FileNotFoundError):
            return
        heads = query_heads_per_group(self.checkpoint.config)
        if is_for_cpu and has_amx and heads > MAX_AMX_HEADS:
            raise ValueError(
                f"vLLM's CPU build fails on a processor with AMX if more than {MAX_AMX_HEADS} query heads share a "
                f"key/value head; here {heads} do. Use --engine transformers, a GPU or a processor without AMX."
            )

    def _parsers(self) -> list[str]:
        """Options for tool calls, if the tokenizer has their tokens, and for reasoning, if the prompt starts it."""
        tokenizer, directory = self.tokenizer, self.checkpoint.directory
        if not tokenizer.chat_template:
            raise ValueError(f"{directory}: has no chat template, which vLLM needs; save the processor there.")
        vocabulary = tokenizer.get_vocab()
        messages, extra = [{"role": "user", "content": "Hello"}], {"enable_thinking": True} if self.thinks else {}
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **extra)
        options = []
        if vocabulary.keys() >= set(TOOL_TOKENS):
            options += ["--enable-auto-tool-choice", "--tool-call-parser", "step3"]
        # vLLM removes special tokens before it looks for the end of the reasoning. If the prompt does not start
        # reasoning, there is no end, and the whole answer would count as reasoning.
        can_end = THINK_END in vocabulary and THINK_END not in self.special_tokens
        if prompt.rstrip().endswith(THINK_START) and can_end:
            options += ["--reasoning-parser", "step3"]
        elif self.thinks:
            needed = f"starts answers with {THINK_START}, and {THINK_END} as a token that is not special"
            raise ValueError(f"--thinking needs a template that {needed}.")
        if self.thinks:
            options += ["--default-chat-template-kwargs", '{"enable_thinking": true}']
        return options

    def check(self, body: dict) -> None:
        super().check(body)
        if body.get("chat_template_kwargs", {}).get("enable_thinking", self.thinks) != self.thinks:
            reason = "vLLM reasons always or never, as the server was started; transformers serve lets you choose."
            raise HTTPException(400, reason)

    def requests(self, body: dict, is_stream: bool) -> list[dict]:
        if is_stream:
            body["stream_options"] = {"include_usage": True}
        if "messages" in body and self.sizes:
            body["mm_processor_kwargs"] = self.sizes
        for message in body.get("messages", []):
            for call in message.get("tool_calls") or []:
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return super().requests(body, is_stream)


ENGINES = {engine.name: engine for engine in (VLLMEngine, TransformersEngine)}
