"""Trains step3-tiny, a very small Step3, on drawn scenes.

python scripts/tiny/train_tiny.py DIRECTORY
python scripts/tiny/train_tiny.py DIRECTORY --quick
python scripts/tiny/train_tiny.py DIRECTORY --start SHALLOWER --steps 1500

Besides answers, the model learns to name what each image token shows (hints), to complete words about a scene (cues),
to know from its second layer on in which picture and where an image token is, and which picture a question is about
(whereabouts), and then for a second picture what the first shows at the same place, and whether the two differ
(counterparts). With answers alone it would learn many times more slowly, or not at all.
"""

import argparse
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from draw_dialogue import (
    MAX_PICTURES,
    Turn,
    about_all,
    differing_scene,
    draw_dialogue,
    draw_question,
    messages_of,
    referring,
)
from draw_scene import COLOURS, KINDS, LAYOUTS, Scene, Shape, ask, draw_scene
from make_random_model import make_tokenizer
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    EvalPrediction,
    GenerationConfig,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.trainer_utils import get_last_checkpoint

from step3_vl import Step3VLConfig, Step3VLForConditionalGeneration, Step3VLImageProcessor, Step3VLProcessor


sys.path.append(str(Path(__file__).parents[1]))
from files import new_directory, replacing, save_whole


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
    "dtype": "float32",
}
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 5,
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
    "dtype": "float32",
}
MAX_QUESTIONS = 8
RECALL = "Recall this picture."
# Seeds that training does not use.
EVALUATION_SEEDS = 10**9
STEPS = 16_200
# The first steps are about single scenes, of which a step takes half the time.
SCENES_ALONE = 2500
# From this step on, more lessons compare pictures; until the second, counterparts are taught for that.
COMPARING, COMPARED = 13_500, 15_600
# The whereabouts of an image token: its picture's number, and the row and column of its cell, as words.
WHEREABOUTS = (
    tuple(str(number) for number in range(1, MAX_PICTURES + 1)),
    ("top", "centre", "bottom"),
    ("left", "centre", "right"),
)
ABILITIES = {
    "scenes": draw_question,
    "two_pictures": partial(draw_dialogue, pictures=2, turns=1),
    "three_pictures": partial(draw_dialogue, pictures=3, turns=1),
    "conversations": draw_dialogue,
}


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
    for turn in (turn for seed in range(1000) for turn in draw_dialogue(seed)):
        texts += [turn.answer, *(part for part in turn.content if isinstance(part, str))]
    texts += ["user", "assistant", RECALL] * 1000
    processor = Step3VLProcessor(image_processor, make_tokenizer(texts, vocab_size=640))
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


class Lessons(Dataset):
    """
    Conversations by seed: at first `num_scenes` about a single scene, and then a fifth. From the lesson `comparing` on,
    more compare pictures, and up to the lesson `compared` they have counterparts. Each image token has a hint: a word
    for what it shows.
    """

    def __init__(self, first_seed: int, length: int, num_scenes: int, comparing: int, compared: int):
        self.first_seed, self.length, self.num_scenes = first_seed, length, num_scenes
        self.comparing, self.compared = comparing, compared

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        choose = random.Random(self.first_seed + index)
        sample = self.draw(choose, index)
        if self.comparing <= index < self.compared:
            sample["counterparts"] = draw_counterparts(choose, sample["scenes"])
        return sample

    def draw(self, choose: random.Random, index: int) -> dict:
        seed, compares, task = self.first_seed + index, index >= self.comparing, "scene"
        if index >= self.num_scenes:
            weights = (1, 1, 3, 3) if compares else (1, 1, 1, 2)
            (task,) = choose.choices(("scene", "recall", "compare", "talk"), weights)
        if task == "talk":
            turns = draw_dialogue(seed, turns=choose.randint(1, MAX_QUESTIONS))
            return {**sample_of(turns), "hints": draw_hints(choose, scenes_of(turns))}
        if task in ("recall", "compare"):
            count = choose.choice((2, 2, 2, 3) if compares else (2, 2, 3))
            scenes = [draw_scene(choose.getrandbits(40)) for _ in range(count)]
            return draw_recall(choose, scenes) if task == "recall" else draw_comparison(choose, scenes)
        scene = draw_scene(seed)
        # Together, one of these would give away the other.
        task = choose.choices(("describe", "recall", "ask"), weights=(7, 7, 6))[0]
        if task == "recall":
            return draw_recall(choose, [scene])
        if task == "describe":
            questions = [scene.questions["describe"]]
        else:
            rounds = [ask(choose, scene.layout, scene.shapes) for _ in range(2)]
            questions = list(dict.fromkeys(q for r in rounds for name, q in r.items() if name != "describe"))
            choose.shuffle(questions)
        questions = questions[:MAX_QUESTIONS]
        return make_sample(choose, [scene], questions, [0] * len(questions))


def scenes_of(turns: list[Turn]) -> list[Scene]:
    return [part for turn in turns for part in turn.content if isinstance(part, Scene)]


def sample_of(turns: list[Turn]) -> dict:
    asked = [turn.asked for turn in turns]
    lessons = {"hints": [], "counterparts": [], "cues": []}
    return {"messages": messages_of(turns), "scenes": scenes_of(turns), "asked": asked, **lessons}


def make_sample(
    choose: random.Random, scenes: list[Scene], questions: list[tuple[str, str]], asked: list[int | None]
) -> dict:
    """A conversation that starts with pictures and has a question and its answer in each turn."""
    turns, content = [], scenes
    for (question, answer), number in zip(questions, asked, strict=True):
        turns.append(Turn((*content, question), "", question, answer, len(scenes), number))
        content = []
    return {**sample_of(turns), "hints": draw_hints(choose, scenes)}


def draw_recall(choose: random.Random, scenes: list[Scene]) -> dict:
    """Cues to complete for each picture, in any order."""
    numbered = choose.sample(list(enumerate(scenes, 1)), len(scenes))
    cues = [draw_cues(choose, scene) for _, scene in numbered]
    questions = [
        (f"In picture {number}: {RECALL}" if len(scenes) > 1 else RECALL, "".join(f" {cue}," for cue, _ in row))
        for (number, _), row in zip(numbered, cues, strict=True)
    ]
    asked = [number - 1 for number, _ in numbered]
    return {**make_sample(choose, scenes, questions, asked), "cues": cues}


def draw_comparison(choose: random.Random, scenes: list[Scene]) -> dict:
    """Questions for which the pictures must be compared, and which shape it was that a comparison found."""
    questions = []
    if len(scenes) == 2 and choose.random() < 0.7:
        while len(scenes[0].shapes) < 2:  # of a single shape, nothing would have to be compared
            scenes[0] = draw_scene(choose.getrandbits(40))
        scenes[1], difference = differing_scene(choose, scenes[0])
        questions = about_all(choose, scenes, difference)
    found = {q.text: q for _ in range(20) for q in about_all(choose, scenes, None) if q.kind == "which"}
    for question in found.values():
        questions.append(question)
        if question.shape and choose.random() < 0.5:
            questions += [q for q in referring(choose, scenes, question) if q.kind == "it"][:1]
    questions = questions[:MAX_QUESTIONS]
    asked = [question.picture if question.kind == "it" else None for question in questions]
    return make_sample(choose, scenes, [(question.text, question.answer) for question in questions], asked)


class Exercises(Dataset):
    """Conversations by seed that training does not draw."""

    def __init__(self, draw: Callable[[int], list[Turn]], length: int):
        self.draw, self.length = draw, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        return sample_of(self.draw(EVALUATION_SEEDS + index))


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


def cells_of(scene: Scene) -> list[str]:
    """The place that each image token of a scene shows."""
    rows = LAYOUTS[scene.layout][1]
    # The patches of elongated pictures show one cell each in 2 x 2 tokens. Global views have 3 x 3 tokens.
    patches = [place for row in rows for place in row for _ in range(4)] if scene.layout != "square" else []
    return patches + [place for row in rows * (3 // len(rows)) for place in row for _ in range(3 // len(row))]


def draw_hints(choose: random.Random, scenes: list[Scene]) -> list[str]:
    """For each image token, the token of a random word about the shape in its cell."""
    return [draw_hint(choose, shape) for scene in scenes for shape in shapes_of(scene)]


def draw_hint(choose: random.Random, shape: Shape | None) -> str:
    if shape is None:
        return "Nothing"
    words = [shape.size, shape.colour, shape.kind, shape.kind]  # kinds are the hardest to tell apart
    return "Ġ" + choose.choice(words + ["striped"] * shape.is_striped)


def shapes_of(scene: Scene) -> list[Shape | None]:
    """The shape that each image token of a scene shows."""
    by_place = {shape.place: shape for shape in scene.shapes}
    return [by_place.get(place) for place in cells_of(scene)]


def draw_counterparts(choose: random.Random, scenes: list[Scene]) -> list[tuple[str | None, int]]:
    """
    For each image token of a second picture with the first one's layout: a hint about the first picture's shape in the
    same cell; and 1 if there are shapes in both cells that differ, 0 if these look the same. None and -100 for others.
    """
    counterparts = []
    for number, scene in enumerate(scenes):
        if number != 1 or scene.layout != scenes[0].layout:
            counterparts += [(None, -100)] * len(cells_of(scene))
            continue
        for old, new in zip(shapes_of(scenes[0]), shapes_of(scene), strict=True):
            differs = -100 if old is None or new is None else int(str(old) != str(new))
            counterparts.append((draw_hint(choose, old), differs))
    return counterparts


def whereabouts_of(scenes: list[Scene]) -> list[list[int]]:
    """For each image token, the index of the right word in each of WHEREABOUTS."""
    _, rows, columns = WHEREABOUTS
    return [
        [number, *(next((i for i in (0, 2) if words[i] in place), 1) for words in (rows, columns))]
        for number, scene in enumerate(scenes)
        for place in cells_of(scene)
    ]


class Collator:
    """
    Pads conversations to a batch. The labels are the assistant's words; for cues, only the tokens that complete them;
    for hints, additionally the token after each image token. `whereabouts` (batch, tokens, 3) are indices in each of
    WHEREABOUTS, or -100; before each token of an answer, only the number of the picture that is asked for.
    `counterparts` (batch, tokens, 2) are each counterpart's hint, as a token, and whether it differs, or -100.
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
        whereabouts = torch.full((*labels.shape, len(WHEREABOUTS)), -100)
        counterparts = torch.full((*labels.shape, 2), -100)
        token_ids = self.processor.tokenizer.convert_tokens_to_ids
        rows = zip(samples, batch["input_ids"], labels, whereabouts, counterparts, strict=True)
        for sample, ids, row, places, others in rows:
            learned = row != -100
            is_start = learned[1:] & ~learned[:-1]
            numbers = torch.tensor([-100 if number is None else number for number in sample["asked"]])
            places[:-1, 0] = numbers[is_start.cumsum(0) - 1].where(learned[1:], -100)
            if sample["scenes"]:
                places[ids == self.processor.image_token_id] = torch.tensor(whereabouts_of(sample["scenes"]))
            if sample["cues"]:
                starts = is_start.nonzero().flatten() + 1
                row[:] = -100
                for position, cues in zip(starts.tolist(), sample["cues"], strict=True):
                    for cue, token in cues:
                        position += len(cue.split())  # each word is a token, and so is the comma
                        row[position] = token_ids(token)
                        position += 1
            if sample["hints"]:
                image_tokens = (ids == self.processor.image_token_id).nonzero().flatten()
                row[image_tokens + 1] = torch.tensor(token_ids(sample["hints"]))
            if sample["counterparts"]:
                others[ids == self.processor.image_token_id] = torch.tensor(
                    [(token_ids(hint) if hint else -100, differs) for hint, differs in sample["counterparts"]]
                )
        return {**batch, "labels": labels, "whereabouts": whereabouts, "counterparts": counterparts}


def share_right(predictions: EvalPrediction) -> dict[str, float]:
    """The share of conversations whose answers are all right, each given the right ones before it."""
    labels = predictions.label_ids[:, 1:]
    right = (predictions.predictions[:, :-1] == labels) | (labels == -100)
    return {"right": float(right.all(-1).mean())}


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


def share_of_rates(step: int, steps: int) -> float:
    """The share of the learning rates at a step: up and down, and up and down again to compare pictures."""
    comparing = steps * COMPARING // STEPS
    if step < comparing:
        return min(1, step / max(min(100, steps // 10), 1), (comparing - step) / (0.4 * comparing))
    return 0.6 * min(1, (steps - step) / (0.5 * (steps - comparing)))


class LessonTrainer(Trainer):
    """
    Adds the losses of what the model should know after inner layers, as its head reads it there: the whereabouts after
    the second, counterparts after the third, and whether they differ after the fourth.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        whereabouts, counterparts = inputs.pop("whereabouts"), inputs.pop("counterparts")
        outputs = model(**inputs, output_hidden_states=True)
        token_ids = self.processing_class.tokenizer.convert_tokens_to_ids
        known = [(3, None, counterparts[..., 0]), (4, ["No", "Yes"], counterparts[..., 1])]
        for words, right in zip(WHEREABOUTS, whereabouts.unbind(-1), strict=True):
            known.append((2, [f"Ġ{word}" for word in words], right))
        loss = outputs.loss
        for layer, words, right in known:
            if layer > len(outputs.hidden_states) - 2:  # of a shallower model
                continue
            is_known = right != -100
            logits = model.lm_head(model.model.language_model.norm(outputs.hidden_states[layer][is_known]))
            if words:
                logits = logits[:, token_ids(words)]
            # The sum of none is 0, their mean is not.
            loss = loss + cross_entropy(logits, right[is_known], reduction="sum") / is_known.sum().clamp(min=1)
        return (loss, outputs) if return_outputs else loss


class Curve(TrainerCallback):
    """Draws the losses and the shares of right answers so far to a PNG file whenever the training is saved."""

    def __init__(self, path: Path):
        try:
            from matplotlib import pyplot
        except ModuleNotFoundError:
            sys.exit("`--curve` needs matplotlib: pip install matplotlib")
        self.path, self.pyplot = path, pyplot

    def on_save(self, args: TrainingArguments, state: TrainerState, control, **kwargs) -> None:
        figure, (losses, shares) = self.pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
        logged = [entry for entry in state.log_history if "loss" in entry]
        losses.semilogy([entry["step"] for entry in logged], [entry["loss"] for entry in logged], linewidth=0.8)
        losses.set_ylabel("loss in training")
        for name in ABILITIES:
            points = [entry for entry in state.log_history if f"eval_{name}_right" in entry]
            right = [100 * entry[f"eval_{name}_right"] for entry in points]
            shares.plot([entry["step"] for entry in points], right, marker=".", label=name.replace("_", " "))
        shares.set(xlabel="steps", ylabel="right, %", ylim=(0, 100))
        shares.legend()
        with replacing(self.path) as unfinished:
            figure.savefig(unfinished, dpi=90, format="png")
        self.pyplot.close(figure)


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


def train(
    directory: Path,
    quick: bool = False,
    steps: int | None = None,
    seed: int = 0,
    resume: bool = False,
    curve: Path | None = None,
    start: Path | None = None,
) -> None:
    """
    Trains the model and saves it in `directory`, with the checkpoints of `Trainer` beside it; draws how it goes to the
    PNG file `curve`. Goes on from the model in `start`, such as step3-tiny's first layers, instead of from nothing.
    Raises a `FileExistsError` if there is an unfinished training without `resume`, or a `FileNotFoundError` if there is
    nothing to resume.
    """
    unfinished = directory.with_name(f"{directory.name}-training")
    if unfinished.exists() and not resume:
        raise FileExistsError(f"{unfinished} has an unfinished training; resume it with --resume or remove it.")
    if resume and (not unfinished.exists() or get_last_checkpoint(unfinished) is None):
        raise FileNotFoundError(f"{unfinished} has no training to resume.")
    if start:
        model, processor = AutoModelForImageTextToText.from_pretrained(start), AutoProcessor.from_pretrained(start)
        model.config.text_config.output_router_logits = True
    else:
        model, processor = make_model(seed)
    if steps is None:
        steps = 300 if quick else STEPS
    batch_size = 8
    arguments = TrainingArguments(
        unfinished,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=64,
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=min(1000, max(steps // 10, 1)),
        save_steps=min(250, max(steps // 10, 1)),
        save_total_limit=2,
        logging_steps=25,
        report_to=[],
        use_cpu=True,
        seed=seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_num_workers=1,
        dataloader_persistent_workers=True,
    )
    optimizer = MuonAndAdamW(model)
    num_lessons = steps * batch_size
    phases = (num_lessons * step // STEPS for step in (0 if start else SCENES_ALONE, COMPARING, COMPARED))
    trainer = LessonTrainer(
        model,
        arguments,
        train_dataset=Lessons(seed * 10**7, num_lessons, *phases),
        eval_dataset={name: Exercises(draw, 100 if steps > 1000 else 8) for name, draw in ABILITIES.items()},
        data_collator=Collator(processor),
        processing_class=processor,
        compute_metrics=share_right,
        preprocess_logits_for_metrics=lambda outputs, labels: outputs[1].argmax(-1),  # the auxiliary loss is first
        optimizers=(optimizer, LambdaLR(optimizer, partial(share_of_rates, steps=steps))),
        callbacks=[Curve(curve)] if curve else [],
    )
    trainer.train(resume_from_checkpoint=resume)
    model.config.text_config.output_router_logits = False
    vars(model.config).pop("use_cache", None)  # set by `Trainer`
    normalise_as_clip(model, processor.image_processor)
    save_whole(directory, model, processor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", type=new_directory, help="directory to create; must not exist yet")
    parser.add_argument("--quick", action="store_true", help="train a worse model in under three minutes")
    parser.add_argument("--steps", type=int, help=f"number of steps (default: {STEPS}, or 300 with --quick)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the scenes (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="resume an interrupted training")
    parser.add_argument("--start", type=Path, metavar="DIRECTORY", help="a model to go on from (default: from nothing)")
    parser.add_argument("--curve", type=Path, metavar="FILE.png", help="draw how it goes; needs matplotlib")
    arguments = parser.parse_args()
    try:
        train(**vars(arguments))
    except (FileExistsError, FileNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
