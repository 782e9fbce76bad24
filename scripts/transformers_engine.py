"""
Runs transformers' command line for `TransformersEngine`, with Step3 registered and its server on the socket that the
environment variable STEP3_ENGINE_SOCKET names:

python scripts/transformers_engine.py serve DIRECTORY
"""

import functools
import os
import sys
from importlib import import_module

import transformers
import uvicorn
from jinja2 import TemplateError
from request_guard import FAILED
from starlette.responses import JSONResponse
from transformers.cli.transformers import main
from transformers.utils import chat_template_utils

import step3_vl  # registers Step3-VL with the Auto classes
from step3_vl.processing_step3 import RESPONSE_TEMPLATE


# The method that turns messages into what processors take.
MESSAGES = "get_processor_inputs_from_messages"


async def refuse(request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": str(error)}, 400)


class Config(uvicorn.Config):
    """A server on the socket. What the processor raises for invalid arguments is the client's fault."""

    def __init__(self, app, **options):
        for kind in (ValueError, OSError, TemplateError):
            app.add_exception_handler(kind, refuse)
        super().__init__(app, uds=os.environ["STEP3_ENGINE_SOCKET"], log_level="warning")


def with_limits(generate):
    """
    `generate` for the server, which says that an answer is cut if it has as many tokens as its settings allow, and
    sends the text of any error in a stream: this one's settings allow no more than the model's positions, and its
    errors say which are not the client's fault.
    """

    @functools.wraps(generate)
    def limited(model, *, input_ids, generation_config, **options):
        if limit := model.config.get_text_config().longest_sequence:
            room = max(limit - input_ids.shape[1], 1)
            generation_config.max_new_tokens = min(generation_config.max_new_tokens, room)
        try:
            return generate(model, input_ids=input_ids, generation_config=generation_config, **options)
        except (RuntimeError, MemoryError, TypeError, AttributeError, LookupError) as error:
            raise RuntimeError(f"{FAILED}: {type(error).__name__}: {error}") from error

    return limited


def set_up() -> None:
    serving = import_module("transformers.cli.serving.utils")
    if not hasattr(serving, "_RESPONSE_TEMPLATE_FALLBACKS") or not hasattr(serving.BaseHandler, MESSAGES):
        sys.exit(f"The server of transformers {transformers.__version__} is of another kind; install a tested release.")
    uvicorn.Config = Config
    # The gateway sends messages as processors take them. The server would drop reasoning, and text beside tool calls.
    setattr(serving.BaseHandler, MESSAGES, staticmethod(lambda messages, modality: messages))
    # With this template the server extracts tool calls and reasoning; without it they stay in the text.
    fields = RESPONSE_TEMPLATE["fields"]
    if not hasattr(chat_template_utils, "_REASONING_FIELDS"):  # the server only knows another name for the reasoning
        fields = {"thinking" if name == "reasoning_content" else name: field for name, field in fields.items()}
    serving._RESPONSE_TEMPLATE_FALLBACKS["step3_vl", "step3_text"] = {**RESPONSE_TEMPLATE, "fields": fields}
    transformers.Step3TextForCausalLM = step3_vl.Step3TextForCausalLM  # the server looks up a text model's class here
    for model in (step3_vl.Step3VLForConditionalGeneration, step3_vl.Step3TextForCausalLM):
        model.generate = with_limits(model.generate)


if __name__ == "__main__":
    set_up()
    main()
