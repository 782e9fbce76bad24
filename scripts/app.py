"""Opens a web page on which to ask a Step3-VL model about pictures.

python scripts/app.py DIRECTORY
python scripts/app.py DIRECTORY --server http://127.0.0.1:8000

The page shows how the model cuts each picture. Nothing leaves this machine but what is sent to the server.
"""

import argparse
import os
import threading
from collections.abc import Iterator


# Before gradio is imported, which would count its uses and fetch fonts.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio
from PIL import Image, ImageDraw
from transformers import AutoProcessor, StoppingCriteria, TextIteratorStreamer


FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}
LINES = "#e0218a"
MAX_NEW_TOKENS = 1024


class Local:
    """A model in this process, which answers one conversation at a time."""

    def __init__(self, model, processor):
        self.model, self.processor, self.lock = model, processor, threading.Lock()

    def picture_part(self, image: Image.Image) -> dict:
        return {"type": "image", "image": image}

    def stream(self, messages: list[dict], max_new_tokens: int) -> Iterator[str]:
        """The answer to a conversation in pieces. Raises what the model raises."""
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = self.processor.apply_chat_template(messages, **options).to(self.model.device)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failures, is_left = [], threading.Event()

        class Left(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return input_ids.new_full(input_ids.shape[:1], is_left.is_set(), dtype=bool)

        def generate() -> None:
            try:
                settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "stopping_criteria": [Left()]}
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


def page(model, processor, title: str) -> gradio.Blocks:
    """A page for a `Local`, or a model on a server with the same methods."""

    def ask(message: dict, turns: list[dict], shown: list):
        answer = ""
        try:
            files = processor.image_processor.fetch_images(message["files"])
            images = [processor.image_processor.process_image(image, do_convert_rgb=True) for image in files]
            text = [{"type": "text", "text": message["text"]}] if message["text"] else []
            turns = [*turns, {"role": "user", "content": [*map(model.picture_part, images), *text]}]
            shown = [*shown, *(cut(image, processor) for image in images)]
            yield None, turns, shown, bubbles(turns), shown
            for piece in model.stream(turns, MAX_NEW_TOKENS):
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
        count = sum(part["type"] != "text" for part in turn["content"])
        text = "".join(part["text"] for part in turn["content"] if part["type"] == "text")
        note = f" *({count} picture{'s' * (count > 1)})*" * bool(count)
        shown.append({"role": turn["role"], "content": text + note})
    return shown


def launch(model, processor, title: str, port: int | None = None) -> None:
    """Serves the page until Ctrl-C. Raises an `OSError` if the port is taken."""
    options = {"theme": gradio.themes.Base(**FONTS), "server_port": port, "max_file_size": "64mb", "footer_links": []}
    print("Press Ctrl-C to stop.")
    page(model, processor, title).queue(default_concurrency_limit=8).launch(**options, share=False)


def main() -> None:
    from describe import Server, add_model_options, load  # which a Space does not have

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", help="directory or hub id; with --server, only its processor is read")
    parser.add_argument("--server", metavar="URL", help="ask a server with the OpenAI API, such as serve.py starts")
    add_model_options(parser)
    parser.add_argument("--port", type=int, help="(default: 7860, or the next that is free)")
    arguments = parser.parse_args()
    try:
        if arguments.server:
            model, processor = Server(arguments.server), AutoProcessor.from_pretrained(arguments.model)
        else:
            options = (arguments.device, arguments.dtype, arguments.experts_implementation)
            model, processor = load(arguments.model, *options)
            model = Local(model, processor)
        launch(model, processor, os.path.basename(os.path.abspath(arguments.model)), arguments.port)
    except OSError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
