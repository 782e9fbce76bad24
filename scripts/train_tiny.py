"""Trains step3-tiny, a Step3 small enough to carry, on scenes that it draws itself.

python scripts/train_tiny.py DIRECTORY
python scripts/train_tiny.py DIRECTORY --quick
"""

import argparse
import random
from pathlib import Path

import torch
from draw_scene import draw_scene
from make_random_model import make_tokenizer
from torch.utils.data import Dataset
from transformers import GenerationConfig, Trainer, TrainingArguments, set_seed

from step3_vl import Step3VLConfig, Step3VLForConditionalGeneration, Step3VLImageProcessor, Step3VLProcessor


VISION = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "output_hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 224,
    "initializer_range": 0.05,
}
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 32,
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
# Scenes of the two sets never share a seed.
EVALUATION_SEEDS = 10**9


def make_model(seed: int) -> tuple[Step3VLForConditionalGeneration, Step3VLProcessor]:
    """The untrained model, and a processor whose tokenizer has a token for each word of the answers."""
    image_processor = Step3VLImageProcessor(size={"height": 224, "width": 224}, patch_size=112, max_image_size=672)
    texts = (text for i in range(2000) for pair in draw_scene(i).questions.values() for text in pair)
    processor = Step3VLProcessor(image_processor, make_tokenizer(texts, vocab_size=384))
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
    )
    return model, processor


class Scenes(Dataset):
    """Scenes by seed; each a picture and, in any order, questions about it with their answers."""

    def __init__(self, first_seed: int, length: int):
        self.first_seed, self.length = first_seed, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        scene = draw_scene(self.first_seed + index)
        questions = list(scene.questions.values())
        random.Random(index).shuffle(questions)
        messages = []
        for question, answer in questions:
            messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
            messages.append({"role": "assistant", "content": answer})
        messages[0]["content"].insert(0, {"type": "image"})
        return {"messages": messages, "image": scene.image}


class Collator:
    """Pads conversations to a batch, with labels where the assistant speaks."""

    def __init__(self, processor: Step3VLProcessor):
        self.processor = processor
        tokenizer = processor.tokenizer
        self.end = tokenizer.convert_tokens_to_ids("<|EOT|>")
        self.start = tokenizer("<|BOT|>assistant\n", add_special_tokens=False)["input_ids"]

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        texts = [self.processor.apply_chat_template(sample["messages"]) for sample in samples]
        images = [[sample["image"]] for sample in samples]
        batch = self.processor(text=texts, images=images, padding=True, return_tensors="pt", add_special_tokens=False)
        labels = torch.full_like(batch["input_ids"], -100)
        for ids, row in zip(batch["input_ids"].tolist(), labels, strict=True):
            position = 0
            while position < len(ids):
                if ids[position : position + len(self.start)] == self.start:
                    begin = position + len(self.start)
                    position = ids.index(self.end, begin) + 1
                    row[begin:position] = torch.tensor(ids[begin:position])
                else:
                    position += 1
        return {**batch, "labels": labels}


def train(directory: Path, quick: bool = False, steps: int | None = None, seed: int = 0, resume: bool = False) -> None:
    model, processor = make_model(seed)
    steps = steps or (150 if quick else 6000)
    batch_size = 16
    arguments = TrainingArguments(
        directory,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=64,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(300, steps // 10),
        weight_decay=0.05,
        adam_beta2=0.98,
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
        train_dataset=Scenes(seed * steps * batch_size, steps * batch_size),
        eval_dataset=Scenes(EVALUATION_SEEDS, 128),
        data_collator=Collator(processor),
    )
    trainer.train(resume_from_checkpoint=resume or None)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", type=Path, help="where the model and its checkpoints go")
    parser.add_argument("--quick", action="store_true", help="a worse model in under three minutes")
    parser.add_argument("--steps", type=int, help="train for so many steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the scenes (default: 0)")
    parser.add_argument("--resume", action="store_true", help="go on from the directory's last checkpoint")
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
