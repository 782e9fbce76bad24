"""Trains step3-tiny, a very small Step3, on drawn scenes.

python scripts/tiny/train_tiny.py DIRECTORY
python scripts/tiny/train_tiny.py DIRECTORY --quick

Besides answers, the model learns to name what each image token shows (hints) and to complete words about the scene
(cues). With answers alone it would learn many times more slowly.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from draw_scene import COLOURS, KINDS, LAYOUTS, Scene, ask, draw_scene
from make_random_model import make_tokenizer
from torch.utils.data import Dataset
from transformers import GenerationConfig, Trainer, TrainingArguments, set_seed
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.trainer_utils import get_last_checkpoint

from step3_vl import Step3VLConfig, Step3VLForConditionalGeneration, Step3VLImageProcessor, Step3VLProcessor


sys.path.append(str(Path(__file__).parents[1]))
from files import new_directory, save_whole


# A picture of 240 px takes 9 tokens, one for each cell of a square scene, and a patch of 160 px takes 4.
VISION = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "output_hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 240,
    "patch_size": 20,
    "initializer_range": 0.05,
}
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 64,
    "share_q_dim": 64,
    "moe_num_experts": 8,
    "moe_top_k": 3,
    "moe_intermediate_size": 64,
    "share_expert_dim": 128,
    "moe_layers_enum": "1,2,3",
    "max_position_embedding": 2048,
    "max_seq_len": 2048,
    "router_aux_loss_coef": 0.01,
    "output_router_logits": True,
    "initializer_range": 0.05,
}
MAX_QUESTIONS = 6
RECALL = "Recall this picture."
# Seeds that training does not use.
EVALUATION_SEEDS = 10**9


def make_model(seed: int) -> tuple[Step3VLForConditionalGeneration, Step3VLProcessor]:
    """An untrained model, and a processor whose tokenizer has a token for each word of the answers."""
    image_processor = Step3VLImageProcessor(
        size={"height": 240, "width": 240},
        patch_size=160,
        max_image_size=960,
        vision_patch_size=20,
        image_mean=[0.8] * 3,  # near the backgrounds
        image_std=[0.27] * 3,
    )
    scenes = [draw_scene(i) for i in range(1000)]
    texts = [text for scene in scenes for pair in scene.questions.values() for text in pair]
    texts += [f" {cue}," for i, scene in enumerate(scenes) for cue, _ in draw_cues(random.Random(i), scene)]
    texts += ["user", "assistant", RECALL] * 1000
    processor = Step3VLProcessor(image_processor, make_tokenizer(texts, vocab_size=480))
    tokenizer = processor.tokenizer
    set_seed(seed)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = Step3VLConfig(
        vision_config=VISION,
        text_config={**TEXT, "vocab_size": len(tokenizer), **special},
        image_token_id=processor.image_token_id,
    )
    model = Step3VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=special["bos_token_id"],
        eos_token_id=[special["eos_token_id"], tokenizer.convert_tokens_to_ids("<|EOT|>")],
        pad_token_id=special["pad_token_id"],
        max_new_tokens=64,
        suppress_tokens=processor.image_token_ids,
    )
    return model, processor


class Scenes(Dataset):
    """
    Scenes by seed. For each there is an image with either its description, cues to complete, or several shorter
    questions with answers; together, one would give away the other. With `with_hints`, there is also a word for each
    image token.
    """

    def __init__(self, first_seed: int, length: int, with_hints: bool):
        self.first_seed, self.length, self.with_hints = first_seed, length, with_hints

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        scene = draw_scene(self.first_seed + index)
        choose = random.Random(self.first_seed + index)
        cues = []
        task = choose.choices(("describe", "recall", "ask"), weights=(7, 7, 6) if self.with_hints else (1, 0, 1))[0]
        if task == "describe":
            questions = [scene.questions["describe"]]
        elif task == "recall":
            cues = draw_cues(choose, scene)
            questions = [(RECALL, "".join(f" {cue}," for cue, _ in cues))]
        else:
            rounds = [ask(choose, scene.layout, scene.shapes) for _ in range(2)]
            questions = list(dict.fromkeys(q for r in rounds for name, q in r.items() if name != "describe"))
            choose.shuffle(questions)
            questions = questions[:MAX_QUESTIONS]
        messages = []
        for question, answer in questions:
            messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
            messages.append({"role": "assistant", "content": answer})
        messages[0]["content"].insert(0, {"type": "image", "image": scene.image})
        hints = draw_hints(choose, scene) if self.with_hints else []
        return {"messages": messages, "hints": hints, "cues": cues}


def draw_cues(choose: random.Random, scene: Scene) -> list[tuple[str, str]]:
    """Words about a scene, each with the token that completes it: a shape's kind with its colour, and so on."""
    kinds, colours = [shape.kind for shape in scene.shapes], [shape.colour for shape in scene.shapes]
    cues = []
    for shape in scene.shapes:
        if kinds.count(shape.kind) == 1:
            cues.append((shape.kind, f"Ġ{shape.colour}"))
            if scene.layout != "square":
                cues.append((f"striped {shape.kind}", "Yes" if shape.is_striped else "No"))
        if colours.count(shape.colour) == 1:
            cues.append((shape.colour, f"Ġ{shape.kind}"))
    by_place = {shape.place: shape for shape in scene.shapes}
    places = [place for row in LAYOUTS[scene.layout][1] for place in row]
    for place in [*choose.sample(places, 3), choose.choice(list(by_place))]:
        shape = by_place.get(place)
        cues.append((place, "Ġ" + choose.choice([shape.size, shape.colour, shape.kind]) if shape else "Nothing"))
    pairs = set(zip(colours, kinds, strict=True))
    for _ in range(4):
        pair = choose.choice(colours + list(COLOURS)), choose.choice(kinds + list(KINDS))
        if choose.random() < 0.5:
            pair = choose.choice(sorted(pairs))
        cues.append((" ".join(pair), "Yes" if pair in pairs else "No"))
    choose.shuffle(cues)
    return cues


def draw_hints(choose: random.Random, scene: Scene) -> list[str]:
    """For each image token of a scene, the token of a random word about the shape in its cell."""
    by_place = {shape.place: shape for shape in scene.shapes}
    rows = [[by_place.get(place) for place in row] for row in LAYOUTS[scene.layout][1]]
    # The patches of elongated pictures show one cell each in 2 x 2 tokens. Global views have 3 x 3 tokens.
    cells = [shape for row in rows for shape in row for _ in range(4)] if scene.layout != "square" else []
    cells += [shape for row in rows * (3 // len(rows)) for shape in row for _ in range(3 // len(row))]
    hints = []
    for shape in cells:
        if shape is None:
            hints.append("Nothing")
        else:
            words = [shape.size, shape.colour, shape.kind, shape.kind]  # kinds are the hardest to tell apart
            words += ["striped"] * shape.is_striped
            hints.append("Ġ" + choose.choice(words))
    return hints


class Collator:
    """
    Pads conversations to a batch. The labels are the assistant's words; for cues, only the tokens that complete them;
    for hints, additionally the token after each image token.
    """

    def __init__(self, processor: Step3VLProcessor):
        self.processor = processor

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        batch = self.processor.apply_chat_template(
            [sample["messages"] for sample in samples],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True},
        )
        labels = batch["input_ids"].where(batch.pop("assistant_masks").bool(), -100)
        token_ids = self.processor.tokenizer.convert_tokens_to_ids
        for sample, ids, row in zip(samples, batch["input_ids"], labels, strict=True):
            if sample["cues"]:
                position = int((row != -100).nonzero()[0])
                row[:] = -100
                for cue, token in sample["cues"]:
                    position += len(cue.split())  # each word is a token, and so is the comma
                    row[position] = token_ids(token)
                    position += 1
            if sample["hints"]:
                image_tokens = (ids == self.processor.image_token_id).nonzero().flatten()
                row[image_tokens + 1] = torch.tensor(token_ids(sample["hints"]))
        return {**batch, "labels": labels}


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon for the matrices inside the model and its AdamW for all other weights, as one optimizer."""

    def __init__(self, model: Step3VLForConditionalGeneration):
        matrices, pixels, others = [], [], []
        for name, parameter in model.named_parameters():
            if "patch_embedding" in name:  # neighbouring pixels are similar, so steps have a large effect
                pixels.append(parameter)
            elif parameter.ndim == 2 and not any(part in name for part in ("embed", "lm_head", "gate.weight")):
                matrices.append(parameter)
            else:
                others.append(parameter)
        self.muon = torch.optim.Muon(matrices, lr=4e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(
            [{"params": others}, {"params": pixels, "lr": 2e-4}], lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05
        )
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})

    def step(self, closure=None):
        # Learning rates, and the state after resuming, are set on this optimizer.
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        for optimizer in (self.muon, self.adamw):
            optimizer.state = self.state
            optimizer.step(closure)


@torch.no_grad()
def normalise_as_clip(model: Step3VLForConditionalGeneration, image_processor: Step3VLImageProcessor) -> None:
    """
    Replaces the processor's mean and standard deviation with CLIP's, which serving engines always use, and changes the
    patch embedding so that the model's outputs stay the same.
    """
    embedding = model.model.vision_model.embeddings.patch_embedding
    old_mean, old_std, mean, std = (
        torch.tensor(values, dtype=torch.float64)
        for values in (image_processor.image_mean, image_processor.image_std, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    )
    weight, bias = embedding.weight.double(), embedding.bias.double()
    embedding.bias.copy_(bias + torch.einsum("ochw,c->o", weight, (mean - old_mean) / old_std))
    embedding.weight.copy_(weight * (std / old_std)[:, None, None])
    image_processor.image_mean, image_processor.image_std = list(OPENAI_CLIP_MEAN), list(OPENAI_CLIP_STD)


def train(directory: Path, quick: bool = False, steps: int | None = None, seed: int = 0, resume: bool = False) -> None:
    """
    Trains the model and saves it in `directory`, with the checkpoints of `Trainer` beside it. Raises a
    `FileExistsError` if there is an unfinished training without `resume`, or a `FileNotFoundError` if there is nothing
    to resume.
    """
    unfinished = directory.with_name(f"{directory.name}-training")
    if unfinished.exists() and not resume:
        raise FileExistsError(f"{unfinished} has an unfinished training; resume it with --resume or remove it.")
    if resume and (not unfinished.exists() or get_last_checkpoint(unfinished) is None):
        raise FileNotFoundError(f"{unfinished} has no training to resume.")
    model, processor = make_model(seed)
    if steps is None:
        steps = 300 if quick else 14000
    batch_size = 8
    arguments = TrainingArguments(
        unfinished,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=64,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, steps // 10),
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=max(steps // 10, 1),
        save_steps=max(steps // 10, 1),
        save_total_limit=2,
        logging_steps=25,
        report_to=[],
        use_cpu=True,
        seed=seed,
        remove_unused_columns=False,
        dataloader_num_workers=1,
        dataloader_persistent_workers=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Scenes(seed * steps * batch_size, steps * batch_size, with_hints=True),
        eval_dataset=Scenes(EVALUATION_SEEDS, 128, with_hints=False),
        data_collator=Collator(processor),
        optimizers=(MuonAndAdamW(model), None),
    )
    trainer.train(resume_from_checkpoint=resume)
    model.config.text_config.output_router_logits = False
    normalise_as_clip(model, processor.image_processor)
    save_whole(directory, model, processor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", type=new_directory, help="directory to create; must not exist yet")
    parser.add_argument("--quick", action="store_true", help="train a worse model in under three minutes")
    parser.add_argument("--steps", type=int, help="number of steps (default: 14000, or 300 with --quick)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the scenes (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="resume an interrupted training")
    arguments = parser.parse_args()
    try:
        train(**vars(arguments))
    except (FileExistsError, FileNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
