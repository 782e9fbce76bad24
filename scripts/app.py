"""Opens a web page on which to ask a Step3-VL model about pictures.

python scripts/app.py DIRECTORY
python scripts/app.py DIRECTORY --server http://127.0.0.1:8000

The page shows how the model cuts each picture. Nothing leaves this machine but what is sent to the server.
"""

import argparse
import base64
import os
import threading
from collections.abc import Iterator
from io import BytesIO


# Before gradio is imported, which would count its uses and fetch fonts.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor, StoppingCriteria, TextIteratorStreamer


FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}
LINES = "#e0218a"
MAX_NEW_TOKENS = 1024


class Local:
    """A model in this process, which answers one conversation at a time."""

    def __init__(self, model: str, processor, trust_remote_code: bool):
        options = {"dtype": "auto", "device_map": "auto", "trust_remote_code": trust_remote_code}
        self.model, self.processor = AutoModelForImageTextToText.from_pretrained(model, **options), processor
        self.lock = threading.Lock()

    def stream(self, turns: list[dict]) -> Iterator[str]:
        """The answer to a conversation in pieces. Raises what the model raises."""
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = self.processor.apply_chat_template(turns, **options).to(self.model.device)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failures, is_left = [], threading.Event()

        class Left(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return input_ids.new_full(input_ids.shape[:1], is_left.is_set(), dtype=bool)

        def generate() -> None:
            try:
                settings = {"max_new_tokens": MAX_NEW_TOKENS, "stopping_criteria": [Left()]}
                self.model.generate(**inputs, **settings, streamer=streamer)
            except Exception as error:  # raised where it is read
                failures.append(error)
                streamer.end()

        with self.lock:
            thread = threading.Thread(target=generate)
            thread.start()
            try:
                yield from streamer
            finally:
                is_left.set()
                thread.join()
        if failures:
            raise failures[0]


class Server:
    """A model behind the OpenAI API. The key in the environment variable STEP3_API_KEY is sent if it is set."""

    def __init__(self, url: str):
        import openai

        base_url = f"{url.rstrip('/').removesuffix('/v1')}/v1"
        self.client = openai.OpenAI(base_url=base_url, api_key=os.environ.get("STEP3_API_KEY", "none"))
        self.model = self.client.models.list().data[0].id

    @staticmethod
    def _part(part: dict) -> dict:
        if part["type"] == "text":
            return part
        with BytesIO() as file:
            part["image"].save(file, "PNG")
            url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}

    def stream(self, turns: list[dict]) -> Iterator[str]:
        """The answer to a conversation in pieces. Raises an `openai.OpenAIError` if the server refuses it."""
        messages = [{**turn, "content": [self._part(part) for part in turn["content"]]} for turn in turns]
        with self.client.chat.completions.create(model=self.model, messages=messages, stream=True) as parts:
            for part in parts:
                yield from (choice.delta.content or "" for choice in part.choices)


def cut(image: Image.Image, processor) -> tuple[Image.Image, str]:
    """An image with lines around the patches that the model sees beside the whole, and a line on what it takes."""
    plan = processor.image_processor.plan(*image.size)
    counts = processor._get_num_multimodal_tokens([(image.height, image.width)])
    width, height = image.size
    shown = image.copy()
    draw, (across, down) = ImageDraw.Draw(shown), (plan.padded_size[i] / plan.cut_size[i] for i in (0, 1))
    for row in range(plan.rows):
        for column in range(plan.columns):
            left, top = column * plan.window * across, row * plan.window * down
            right, bottom = min(left + plan.window * across, width) - 1, min(top + plan.window * down, height) - 1
            if right > left and bottom > top:
                draw.rectangle((left, top, right, bottom), outline=LINES, width=max(2, max(image.size) // 200))
    patches = f"{plan.rows} x {plan.columns} patches" if plan.num_patches else "no patches"
    return shown, f"{width} x {height} pixels, {patches}, {counts.num_image_tokens[0]} tokens"


def page(model: Local | Server, processor, title: str) -> gradio.Blocks:
    def ask(message: dict, turns: list[dict], shown: list):
        images = [processor.image_processor.process_image(Image.open(path)) for path in message["files"]]
        text = [{"type": "text", "text": message["text"]}] if message["text"] else []
        turns = [*turns, {"role": "user", "content": [*({"type": "image", "image": image} for image in images), *text]}]
        shown = [*shown, *(cut(image, processor) for image in images)]
        answer = ""
        yield None, turns, shown, bubbles(turns), shown
        try:
            for piece in model.stream(turns):
                answer += piece
                yield None, turns, shown, [*bubbles(turns), {"role": "assistant", "content": answer}], shown
        except Exception as error:
            raise gradio.Error(str(error) or type(error).__name__) from error
        turns = [*turns, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        yield None, turns, shown, bubbles(turns), shown

    with gradio.Blocks(title=title, analytics_enabled=False) as blocks:
        gradio.Markdown(f"# {title}")
        with gradio.Row():
            with gradio.Column(scale=3):
                conversation = gradio.Chatbot(height=460, label="Conversation", buttons=["copy"])
                options = {"file_types": ["image"], "file_count": "multiple", "show_label": False}
                message = gradio.MultimodalTextbox(placeholder="Drop pictures here, and ask", **options)
            with gradio.Column(scale=2):
                options = {"object_fit": "contain", "columns": 1, "height": 560, "buttons": ["fullscreen"]}
                gallery = gradio.Gallery(label="Each picture is seen as a whole and in patches", **options)
        turns, shown = gradio.State([]), gradio.State([])
        message.submit(ask, [message, turns, shown], [message, turns, shown, conversation, gallery])
        conversation.clear(lambda: (None, [], [], [], []), None, [message, turns, shown, conversation, gallery])
    return blocks


def bubbles(turns: list[dict]) -> list[dict]:
    """A conversation as the page shows it: its text, and how many pictures came with it."""
    shown = []
    for turn in turns:
        count = sum(part["type"] == "image" for part in turn["content"])
        text = "".join(part["text"] for part in turn["content"] if part["type"] == "text")
        note = f" *({count} picture{'s' * (count > 1)})*" * bool(count)
        shown.append({"role": turn["role"], "content": text + note})
    return shown


def launch(model: str, server: str | None = None, port: int | None = None, trust_remote_code: bool = False) -> None:
    """Serves the page until Ctrl-C. Raises an `OSError` if the model cannot be read or the server not be reached."""
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=trust_remote_code)
    answering = Server(server) if server else Local(model, processor, trust_remote_code)
    options = {"theme": gradio.themes.Base(**FONTS), "server_port": port, "max_file_size": "64mb", "footer_links": []}
    blocks = page(answering, processor, os.path.basename(os.path.abspath(model)))
    print("Press Ctrl-C to stop.")
    blocks.queue(default_concurrency_limit=8).launch(**options, share=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", help="directory or hub id; with --server, only its processor is read")
    parser.add_argument("--server", metavar="URL", help="ask a server with the OpenAI API, such as serve.py starts")
    parser.add_argument("--port", type=int, help="(default: 7860, or the next that is free)")
    import step3_vl  # noqa: F401  (registers Step3-VL with the Auto classes)

    try:
        launch(**vars(parser.parse_args()))
    except OSError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
